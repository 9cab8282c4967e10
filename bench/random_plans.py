"""Random `qdist plan` commands, and what becomes of the hints that they are refused with, each followed to the letter:
`python bench/random_plans.py [--count 2000] [--seed 0]`.

Half of them are commands that people type, the other half has odd values, or settings that contradict each other.
"""

import argparse
import random
import re
import shlex
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from typing import Any, NamedTuple

from qdist.cli.plan import Request, plan, planned
from qdist.core.cards import TITLES
from qdist.core.cluster import Cluster, Gpu
from qdist.core.errors import QdistError
from qdist.core.models import ALIASES
from qdist.core.units import GIB

NO_HINT = "a smaller model, or larger GPUs"
NO_GPU = Cluster(device="cpu", gpus=(), cpu_count=8, memory_bytes=32 * GIB, memory_free_bytes=30 * GIB)
MEMORIES = (4, 6, 8, 11, 12, 16, 24, 32, 40, 48, 80, 94, 141, 180, 192)
COUNTS = (1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16, 24, 32, 64)
PLAUSIBLE: dict[str, Sequence[Any]] = {
    "seq_len": (256, 512, 1024, 2048, 4096), "global_batch": (8, 16, 32, 64, 128, 256), "micro_batch": (1, 2, 4, 8),
    "lora.r": (8, 16, 32, 64, 128), "lora.targets": ("all-linear", "q_proj,v_proj", "query_key_value"),
    "lora.dropout": (0, 0.05, 0.1), "lora.alpha": (16, 32), "steps": (100, 1000), "epochs": (1, 3),
    "placement": ("replicate", "shard", "split", "auto"), "gpus_per_group": (1, 2, 4, 8),
    "zero.stage": (0, 1, 2, 3), "zero.offload": ("none", "cpu"), "split.schedule": ("1f1b", "sequential"),
    "split.offload_layers": (0, 4, 16), "max_memory": ("12GiB", "24GiB", "40GB"),
    "train.checkpointing": ("true", "false"), "train.verify_steps": (0, 50), "train.answers": (0, 5),
    "train.held_out": (0, 0.1), "train.eval_steps": (0, 50), "optim.name": ("adamw", "paged-adamw"),
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
ODD_MEMORIES = ("", "nan", "0", "48", "-5GiB", "1e400GiB", "1MiB", "9999999TiB", "24 GX", "1GiB", "5 TiB")
ODD_NAMES = ("", "abacus", "4090", "h100sxm", "RTX 4900", "GeForce")


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


class Row(NamedTuple):
    """A command, what it came to, and what it came to with its hint followed; None where there was none to follow."""

    draw: Draw
    first: Outcome
    hint: str
    """What became of it: nothing where there was none."""
    second: Outcome


def main() -> None:
    """Print what became of commands and hints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    with Pool(arguments.jobs) as pool:
        rows = pool.map(partial(trial, arguments.seed), range(arguments.count), chunksize=10)
    print("\n".join(table(rows)))


def trial(seed: int, number: int) -> Row:
    """One command, and the hint of its refusal followed."""
    drawn = draw(random.Random(f"{seed}-{number}"))
    first = run(drawn)
    if not first.try_ or first.try_ == NO_HINT:
        return Row(drawn, first, "none" if first.kind else "", Outcome())
    words = followed(drawn.words, first)
    if words is None:
        return Row(drawn, first, "unparsable", Outcome())
    second = run(Draw(words, drawn.here))
    if second.crashed:
        return Row(drawn, first, "exception", second)
    became = "plan" if not second.kind else "same kind" if second.kind == first.kind else "another kind"
    return Row(drawn, first, became, second)


def run(drawn: Draw) -> Outcome:
    """What `qdist plan` makes of a command. What no user can have caused is caught here, to be counted."""
    try:
        with plan.make_context("plan", list(drawn.words)) as context:
            typed = {key: value for key, value in context.params.items() if key != "as_json"}
            planned(Request(**typed), lambda: drawn.here)
    except QdistError as error:
        return Outcome(kind(error), error.message, error.try_)
    except Exception:  # noqa: BLE001
        return Outcome("exception", crashed=traceback.format_exc())
    return Outcome()


def kind(error: QdistError) -> str:
    """A refusal without what it says of this command."""
    plain = re.sub(r"'.*?'(?= |:|,|$)|\b(" + "|".join(map(re.escape, ALIASES)) + r")\b", "_", error.message)
    plain = re.sub(r"-?\d[\d,.]*(e[+-]?\d+)?", "#", plain)
    return f"{type(error).__name__}: {re.sub(r'# [KMGT]?i?B', '# B', plain)}"[:110]


def followed(words: Sequence[str], refused: Outcome) -> tuple[str, ...] | None:
    """The command with a hint followed to the letter; None where the hint is not to be typed."""
    hint = re.sub(r" \(.*\)$|, for GPUs that are not here", "", refused.try_)
    left_out = re.findall(r"leave (?:--)?([\w.-]+) out", hint)
    if left_out:
        return tuple(pair for key in left_out for pair in without(words, key.replace("-", "_")))
    parts = shlex.split(hint)
    if not parts or len(parts) % 2 or not all(flag.startswith("--") for flag in parts[::2]):
        return None
    kept = list(words)
    unknown = re.match(r"unknown setting '(.*)'", refused.error)
    if unknown:
        kept = list(without(kept, unknown[1]))
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
    for key in chance.sample(list(PLAUSIBLE), chance.choice((0, 1, 1, 2, 2, 3, 4))):
        words += ["--set", f"{key}={chance.choice(PLAUSIBLE[key])}"]
    for key in chance.sample(list(ODD), chance.choice((0, 1, 1, 1, 2))) if odd else ():
        words += ["--set", f"{key}={chance.choice(ODD[key])}"]
    return Draw(tuple(words), here(chance))


def machine(chance: random.Random, odd: bool) -> list[str]:
    """Flags that describe one; none, now and then."""
    words: list[str] = []
    described = chance.random()
    if described < 0.65:
        words += ["--gpu-memory", f"{chance.choice(MEMORIES)}GiB"]
    elif described < 0.9:
        words += ["--gpu-name", chance.choice(TITLES)]
    if odd and chance.random() < 0.1:
        words += chance.choice((["--gpu-memory", chance.choice(ODD_MEMORIES)], ["--gpu-name", chance.choice(ODD_NAMES)]))
    if chance.random() < 0.85:
        words += ["--gpus", str(chance.choice((100, 1024, 5000, 10**12) if odd and chance.random() < 0.05 else COUNTS))]
    if chance.random() < 0.25:
        words += ["--host-memory", f"{chance.choice((8, 16, 32, 64, 256, 1024))}GiB"]
    if odd and chance.random() < 0.05:
        words += ["--host-memory", chance.choice(ODD_MEMORIES)]
    return words


def here(chance: random.Random) -> Cluster:
    """The machine where the command is typed: without GPUs, or with uneven ones."""
    if chance.random() < 0.5:
        return NO_GPU
    gpus = tuple(
        Gpu(index=index, name="NVIDIA A100-SXM4-80GB", total_bytes=(size := chance.choice(MEMORIES) * GIB), free_bytes=size)
        for index in range(chance.choice((1, 2, 3, 4, 8)))
    )
    return Cluster(device="cuda", gpus=gpus, cpu_count=16, memory_bytes=128 * GIB, memory_free_bytes=120 * GIB)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Counts, then exceptions and what hints did not lead to a plan."""
    refused = [row for row in rows if row.first.kind]
    crashes = [row for row in rows if row.first.crashed or row.second.crashed]
    yield f"{len(rows)} commands: {len(rows) - len(refused)} plans, {len(refused)} refusals, {len(crashes)} exceptions"
    for name, number in Counter(row.first.kind for row in refused).most_common():
        yield f"  {number:5} {name}"
    became = Counter(row.hint for row in refused)
    hints = sum(number for name, number in became.items() if name != "none")
    yield f"{hints} hints followed, {became['none']} refusals without one"
    for name in ("plan", "another kind", "same kind", "unparsable", "exception"):
        yield f"  {became[name]:5} {100 * became[name] / max(1, hints):5.1f} %  {name}"
    for row in refused:
        if row.hint != "plan":
            yield f"\n{row.hint}: qdist plan {shlex.join(row.draw.words)}"
            yield f"    {row.first.error}\n    try: {row.first.try_}"
            yield f"    -> {row.second.error}\n    try: {row.second.try_}" * bool(row.second.kind)
            yield row.first.crashed + row.second.crashed


if __name__ == "__main__":
    main()
