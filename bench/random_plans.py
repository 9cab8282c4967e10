"""Random `qdist plan` commands, and what becomes of the hints that they are refused with, each followed to the letter:
`python bench/random_plans.py [--count 2000] [--seed 0]`.

Half of them are commands that people type, the other half has odd values, or settings that contradict each other.
"""

import argparse
import random
import re
import shlex
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, NamedTuple

from qdist.cli.plan import plan, requested
from qdist.core.errors import QdistError
from qdist.core.machine.cards import CARDS
from qdist.core.machine.cluster import Cluster, Gpu
from qdist.core.model.aliases import ALIASES
from qdist.core.text import GIB
from qdist.host.launch.planning import planned

NO_HINT = "a smaller model, or larger GPUs"
NO_GPU = Cluster(device="cpu", gpus=(), cpu_count=8, memory_bytes=32 * GIB, memory_free_bytes=30 * GIB)
MEMORIES = (4, 6, 8, 11, 12, 16, 24, 32, 40, 48, 80, 94, 141, 180, 192)
FLAGS = ("bits", "method", "placement", "gpus_per_group", "max_memory")
COUNTS = (1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 8, 12, 16, 24, 32, 64)
PLAUSIBLE: dict[str, Sequence[Any]] = {
    "seq_len": (256, 1024, 2048, 4096, 8192, 32_768), "global_batch": (8, 16, 32, 64, 128, 256, 1024),
    "micro_batch": (1, 2, 4, 8, 16),
    "lora.r": (8, 16, 32, 64, 128), "lora.targets": ("all-linear", "q_proj,v_proj", "query_key_value"),
    "lora.dropout": (0, 0.05, 0.1), "lora.alpha": (16, 32), "steps": (100, 1000), "epochs": (1, 3),
    "placement": ("replicate", "shard", "split", "auto"), "gpus_per_group": (1, 2, 4, 8),
    "zero.stage": (0, 1, 2, 3), "zero.offload": ("none", "cpu"), "split.schedule": ("1f1b", "sequential"),
    "split.offload_layers": (0, 4, 16), "max_memory": ("12GiB", "24GiB", "40GB"),
    "train.checkpointing": ("true", "false"), "train.verify_steps": (0, 50), "train.answers": (0, 5),
    "train.held_out": (0, 0.1), "train.eval_steps": (0, 50), "optim.name": ("adamw", "paged-adamw", "adamw-8bit"),
    "optim.lr_ratio_b": (1, 16),
    "optim.schedule": ("constant", "cosine", "linear"), "optim.warmup_steps": (0, 10), "liger": ("true", "false"),
    "dtype": ("bfloat16", "float16", "float32"), "quant.type": ("nf4", "fp4"), "quant.double": ("true", "false"),
    "quant.group_size": (-1, 32, 64, 128), "lora.pool": ("peft", "mean", "sum"), "lora.pool_group_size": (32, 64, 128),
    "new_tokens": ("<a>,<b>",),
}  # fmt: skip
ODD: dict[str, Sequence[Any]] = {
    "seq_len": (1, 7, 8, 9, 100_000, 10**6, 2**62, 10**30, "nan", "-5", ""), "lora.targets": ("q_prj", "q_proj,x", ","),
    "global_batch": (0, 1, 2, 3, 7, 13, 97, 1001, 10**6, 2**61, 2**63, "x"), "steps": (0, 2**62, -1, "all"),
    "micro_batch": (0, 3, 5, 7, 16, 100, 2**40, "1.5"), "lora.r": (0, 1, 3, 1000, 10**5, 2**40, 2**62, "64.0"),
    "lora.alpha": (0, "inf", 1e-300), "lora.dropout": (1, 0.999, -0.1), "epochs": (0, 0.001, 1e300, "nan"),
    "placement": ("fsdp", "pp", "offload", "1f1b", "sequential", "replicat", "SPLIT"),
    "gpus_per_group": (0, 3, 5, 16, 64, 10**9, 2**62), "zero.stage": (4, -1, "two"), "zero.offload": ("nvme", "disk"),
    "split.schedule": ("gpipe", "auto"), "split.offload_layers": (1, 79, 500, 2**60, -1, "all"),
    "max_memory": ("0", "nan", "1e400GiB", "-5GiB", "48", "1MiB", "9" * 400 + "GiB", "200 GB", "x"),
    "train.checkpointing": ("maybe", "1"), "train.verify_steps": (1, 2**62), "train.answers": (2**62,),
    "train.held_out": (1, 0.9999, "nan"), "train.save_steps": (0, 1), "train.keep": (0, 10**9),
    "train.stuck_seconds": (-1, 0), "optim.name": ("sgd", "adam"), "optim.lr": (0, "1e999", 1e-300),
    "optim.warmup_steps": (2**62, -3), "dtype": ("bf16", "int8"), "quant.type": ("nf5", "int4"),
    "quant.group_size": (0, 16, 256, "all"), "lora.pool": ("max",), "lora.pool_group_size": (0, 1, 7, 48, 512, 2**60),
    "bits": (2, 3, 5, 16, "four"), "method": ("lora", "qalora", "gptq"), "liger": ("yes",), "seed": (-1, 2**70),
    "learning_rate": (1e-4,), "per_device_train_batch_size": (4,), "lora_r": (8,), "load_format": ("dummy", "none"),
}  # fmt: skip
ODD_AMOUNTS = ("", "nan", "0", "48", "-5GiB", "1e400GiB", "1MiB", "9999999TiB", "24 GX", "1GiB", "5 TiB")
ODD_MACHINES: dict[str, Sequence[Any]] = {
    "--gpu-memory": ODD_AMOUNTS, "--host-memory": ODD_AMOUNTS, "--gpus": (100, 192, 256, 5000, 10**12),
    "--gpu-name": ("", "abacus", "4090", "h100sxm", "RTX 4900", "GeForce"),
}  # fmt: skip


class Draw(NamedTuple):
    """A command, and the machine where it is typed."""

    words: tuple[str, ...]
    here: Cluster


class Outcome(NamedTuple):
    """What a command came to: nothing but a plan where `kind` is empty."""

    kind: str = ""
    error: str = ""
    try_: str = ""
    crashed: str = ""
    seconds: float = 0.0


class Row(NamedTuple):
    """A command, what it came to, and what it came to with the hint of its refusal followed."""

    draw: Draw
    first: Outcome
    became: str
    """Of the hint; nothing where there was none."""
    second: Outcome


def main() -> None:
    """Print what became of commands and hints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        print("\n".join(table(trials(arguments.seed, arguments.count, pool))))


def trials(seed: int | str, count: int, pool: Executor) -> list[Row]:
    """So many commands; the hints of their refusals are followed."""
    draws = [draw(random.Random(f"{seed}-{number}")) for number in range(count)]
    firsts = outcomes(draws, pool)
    words = [followed(own.words, first) for own, first in zip(draws, firsts, strict=True)]
    again = [Draw(typed, own.here) for own, typed in zip(draws, words, strict=True) if typed]
    seconds = iter(outcomes(again, pool))
    return [
        row(own, first, next(seconds) if typed else None)
        for own, first, typed in zip(draws, firsts, words, strict=True)
    ]


def row(own: Draw, first: Outcome, second: Outcome | None) -> Row:
    """What became of a command's hint."""
    if second is None:
        wordless = not first.try_ or first.try_ == NO_HINT
        return Row(own, first, "" if not first.kind else "none" if wordless else "unparsable", Outcome())
    became = "exception" if second.crashed else "plan" if not second.kind else "another kind"
    return Row(own, first, "same kind" if second.kind == first.kind else became, second)


def outcomes(draws: Sequence[Draw], pool: Executor) -> list[Outcome]:
    """What each command comes to; what no user can have caused is counted, not raised."""
    tasks = [pool.submit(run, own) for own in draws]
    crashes = [task.exception() for task in tasks]
    return [
        Outcome("exception", crashed="".join(traceback.format_exception(crash))) if crash else task.result()
        for task, crash in zip(tasks, crashes, strict=True)
    ]


def run(drawn: Draw) -> Outcome:
    """What `qdist plan` makes of a command."""
    began = time.process_time()
    try:
        with plan.make_context("plan", list(drawn.words)) as context:
            typed = {key: value for key, value in context.params.items() if key != "form"}
            planned(requested(**typed), lambda: drawn.here)
    except QdistError as error:
        return Outcome(kind(error), error.message, error.try_, seconds=time.process_time() - began)
    return Outcome(seconds=time.process_time() - began)


def kind(error: QdistError) -> str:
    """A refusal without what it says of this command."""
    plain = re.sub(r"'.*?'(?= |:|,|$)|\b(" + "|".join(map(re.escape, ALIASES)) + r")\b", "_", error.message)
    plain = re.sub(r"-?\d[\d,.]*(e[+-]?\d+)?", "#", plain)
    return f"{type(error).__name__}: {re.sub(r'# [KMGT]?i?B', '# B', plain)}"[:110]


def followed(words: Sequence[str], refused: Outcome) -> tuple[str, ...] | None:
    """The command with a hint followed to the letter; None where the hint is not to be typed."""
    if not refused.try_ or refused.try_ == NO_HINT:
        return None
    hint = re.sub(r" \(.*\)$|, for GPUs that are not here", "", refused.try_)
    left_out = re.findall(r"leave (?:--)?([\w.-]+) out", hint)
    if left_out:
        return tuple(pair for key in left_out for pair in without(words, key.replace("-", "_")))
    parts = shlex.split(hint)
    if not parts or len(parts) % 2 or not all(flag.startswith("--") for flag in parts[::2]):
        return None
    kept = list(words)
    for unknown in re.findall(r"unknown setting '(.*?)'", refused.error):
        kept = list(without(kept, unknown))
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        key = value.partition("=")[0] if flag == "--set" else flag.removeprefix("--").replace("-", "_")
        kept = list(without(kept, key))
    return (*kept, *parts)


def without(words: Sequence[str], key: str) -> Iterator[str]:
    """A command without a setting, whichever way it was given."""
    for flag, value in zip(words[::2], words[1::2], strict=True):
        own = value.partition("=")[0] if flag == "--set" else flag.removeprefix("--").replace("-", "_")
        if own != key:
            yield from (flag, value)


def draw(chance: random.Random) -> Draw:
    """A random command. `qdist plan` has options with a value alone, so words come in pairs."""
    odd = chance.random() < 0.5
    words = ["--model", chance.choice(list(ALIASES))]
    words += machine(chance, odd)
    if chance.random() < 0.4:
        words += ["--bits", str(chance.choice((4, 4, 8, 16)))]
    if chance.random() < 0.35:
        words += ["--method", chance.choice(("qlora", "gptq-lora", "qa-lora"))]
    settings = {key: PLAUSIBLE[key] for key in chance.sample(list(PLAUSIBLE), chance.choice((0, 1, 1, 2, 2, 3, 4)))}
    if odd:
        settings |= {key: ODD[key] for key in chance.sample(list(ODD), chance.choice((0, 1, 1, 1, 2)))}
    for key, values in settings.items():
        value = str(chance.choice(values))
        flag = key in FLAGS and chance.random() < 0.5
        words += [f"--{key.replace('_', '-')}", value] if flag else ["--set", f"{key}={value}"]
    return Draw(tuple(words), here(chance))


def machine(chance: random.Random, odd: bool) -> list[str]:
    """Flags that describe one; none, now and then."""
    words: list[str] = []
    described = chance.random()
    if described < 0.65:
        words += ["--gpu-memory", f"{chance.choice(MEMORIES)}GiB"]
    elif described < 0.9:
        words += ["--gpu-name", chance.choice(CARDS).title]
    if chance.random() < 0.85:
        words += ["--gpus", str(chance.choice(COUNTS))]
    if chance.random() < 0.25:
        words += ["--host-memory", f"{chance.choice((8, 16, 32, 64, 256, 1024))}GiB"]
    if odd and chance.random() < 0.2:
        flag = chance.choice(list(ODD_MACHINES))
        words += [flag, str(chance.choice(ODD_MACHINES[flag]))]
    return words


def here(chance: random.Random) -> Cluster:
    """The machine where the command is typed: without GPUs, or with uneven ones."""
    if chance.random() < 0.5:
        return NO_GPU
    sizes = [chance.choice(MEMORIES) * GIB for _ in range(chance.choice((1, 2, 3, 4, 8)))]
    gpus = tuple(
        Gpu(index=index, name="NVIDIA A100-SXM4-80GB", total_bytes=size, free_bytes=size)
        for index, size in enumerate(sizes)
    )
    return Cluster(device="cuda", gpus=gpus, cpu_count=16, memory_bytes=128 * GIB, memory_free_bytes=120 * GIB)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Counts, then exceptions and the hints that did not lead to a plan."""
    refused = [row for row in rows if row.first.kind]
    crashes = [row for row in rows if row.first.crashed or row.second.crashed]
    yield f"{len(rows)} commands: {len(rows) - len(refused)} plans, {len(refused)} refusals, {len(crashes)} exceptions"
    for name, number in Counter(row.first.kind for row in refused).most_common():
        yield f"  {number:5} {name}"
    became = Counter(row.became for row in refused)
    hints = sum(number for name, number in became.items() if name != "none")
    yield f"{hints} hints followed, {became['none']} refusals without one"
    for name in ("plan", "another kind", "same kind", "unparsable", "exception"):
        yield f"  {became[name]:5} {100 * became[name] / max(1, hints):5.1f} %  {name}"
    for what, some in (("plan", [row for row in rows if not row.first.kind]), ("refusal", refused)):
        slowest = max(some, key=lambda row: row.first.seconds)
        yield f"slowest {what}: {slowest.first.seconds:.2f} s, qdist plan {shlex.join(slowest.draw.words)}"
    for row in refused:
        if row.became != "plan":
            yield f"\n{row.became or 'exception'}: qdist plan {shlex.join(row.draw.words)}"
            yield f"    {row.first.error}\n    try: {row.first.try_}"
            yield f"    -> {row.second.error}\n    try: {row.second.try_}"
            yield row.first.crashed + row.second.crashed


if __name__ == "__main__":
    main()
