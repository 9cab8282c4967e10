"""Whole runs killed at random moments, one to three times, and resumed: are they the run that was never killed?

    python -m bench.chaos.kills [--count 100] [--seed 0] [--jobs N] [--minutes M] [--copies 4]

Each draw is a run: a layout (replicate, shard, split, groups, ZeRO 0 to 3, offload) of 1 to 4 CPU ranks, a method and a
precision, with dropout; when it saves, evaluates and forgets is drawn too. It is run once to its end, then `--copies`
times killed: at a moment drawn from the whole life of the launch, with a cold cache in half of them; what is killed is
the launcher, qdist.host.launch.agent, a rank, the process that prepares, or all of them. Then the same command with
--resume, or again where there is no plan yet, which may be killed as well. Losses, adapter, checkpoints and what the
result says must be equal, not close. Exit code 1 where anything differs, stays behind or shows a traceback.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.chaos.ground import Ground, left, processes, qdist, table
from bench.chaos.trials import each, finish, folder_for, parser, why
from qdist.core.telemetry.events import decode_lines, losses
from qdist.host.run.rundir import RunDir

LAYOUTS: dict[str, tuple[str, ...]] = {
    "replicate 1": ("--gpus=1",),
    "replicate 2": ("--gpus=2",),
    "replicate 4": ("--gpus=4",),
    "zero-0 2": ("--gpus=2", "--set=zero.stage=0"),
    "zero-1 2": ("--gpus=2", "--set=zero.stage=1"),
    "zero-3 2": ("--gpus=2", "--set=zero.stage=3"),
    "zero-2 cpu": ("--gpus=2", "--set=zero.offload=cpu"),
    "zero-1 1": ("--gpus=1", "--set=zero.stage=1"),
    "shard 2": ("--gpus=2", "--placement=shard"),
    "shard 2x2": ("--gpus=4", "--placement=shard", "--gpus-per-group=2"),
    "shard 4": ("--gpus=4", "--placement=shard"),
    "split 2": ("--gpus=2", "--placement=split"),
    "split 2x2": ("--gpus=4", "--placement=split", "--gpus-per-group=2"),
}
SEQUENTIAL = ("--gpus=1", "--placement=split", "--gpus-per-group=1", "--set=split.offload_layers=1")
"""One process over GPUs and host memory: of a machine with a GPU, with --gpu."""
METHODS: dict[str, tuple[str, ...]] = {
    "nf4": (), "int8": ("--bits=8",), "16 bits": ("--bits=16",), "gptq-lora": ("--method=gptq-lora",),
    "qa-lora": ("--method=qa-lora",),
}  # fmt: skip
VICTIMS = ("launcher", "agent", "rank", "all", "preparing")
LONGEST_S, ORPHANED_S = 240.0, 5.0


class Draw(NamedTuple):
    """A run and how often it is killed. folder: of this draw alone."""

    folder: Path
    seed: str
    copies: int
    layout: str
    method: str
    flags: tuple[str, ...]
    is_gpu: bool


class Row(NamedTuple):
    """A killed copy. Lists are sentences; empty where all is well."""

    kills: tuple[str, ...]
    differ: list[str]
    orphans: list[str]
    tracebacks: list[str]
    failed: list[str]

    @property
    def is_well(self) -> bool:
        return not (self.differ or self.orphans or self.tracebacks or self.failed)


class Said(NamedTuple):
    """How a command ended, and what it said on both its streams."""

    code: int
    text: str


def main() -> None:
    """Draw, run, kill, compare."""
    options = parser("bench.chaos.kills", __doc__ or "", count=100, of="Killed runs.")
    options.add_argument("--copies", type=int, default=4, help="Killed runs of each draw.  [default: 4]")
    options.add_argument("--gpu", action="store_true", help="Draw runs of one GPU instead of CPU ranks.")
    given = options.parse_args()
    folder, rows, refused = folder_for("kills"), [], 0
    draws = drawn(folder, given.seed, -(-given.count // given.copies), given.copies, is_gpu=given.gpu)
    for draw, found in each(trial, draws, folder=folder, jobs=given.jobs, minutes=given.minutes):
        name = f"{draw.layout}, {draw.method}"
        if isinstance(found, BaseException):
            rows.append((draw, Row((), [], [], [], [why(found)])))
            print(f"{name}: {why(found)}", flush=True)
        elif isinstance(found, str):
            refused += 1
            print(f"{name}: not to be had: {found}", flush=True)
        else:
            rows += [(draw, row) for row in found]
            for row in found:
                said = "; ".join((*row.differ, *row.orphans, *row.tracebacks, *row.failed)) or "identical"
                print(f"{name}: {' then '.join(row.kills)}: {said}", flush=True)
    print(summary(rows, refused))
    finish(folder, keep=given.keep, missed=not rows or not all(row.is_well for _, row in rows))


def drawn(folder: Path, seed: int, count: int, copies: int, *, is_gpu: bool) -> Iterator[Draw]:
    """Every layout with every method in a drawn order, again and again."""
    layouts = {"one GPU": ("--gpus=1",), "sequential": SEQUENTIAL} if is_gpu else LAYOUTS
    dice = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    for number in range(count):
        if not pairs:
            pairs = [(layout, method) for layout in layouts for method in METHODS]
            dice.shuffle(pairs)
        layout, method = pairs.pop()
        steps = dice.randint(16, 40)
        settings = {
            "steps": steps, "seed": dice.randrange(1000), "lora.dropout": 0.1, "train.held_out": 0.1,
            "train.save_steps": dice.randint(2, 7), "train.eval_steps": dice.randint(3, 11),
            "train.keep": dice.randint(1, 3), "train.answers": dice.choice((0, 2)), "global_batch": 8,
            "optim.schedule": dice.choice(("constant", "cosine")),
        }  # fmt: skip
        flags = (*layouts[layout], *METHODS[method], *(f"--set={key}={value}" for key, value in settings.items()))
        yield Draw(folder / f"{number:03}", f"{seed}-{number}", copies, layout, method, flags, is_gpu)


def trial(draw: Draw) -> list[Row] | str:
    """The killed copies of a draw, or why there is no such run."""
    ground, dice = Ground(draw.folder), random.Random(draw.seed)
    twin = ground.folder / "twin"
    began = time.monotonic()
    said = run_on(ground, command(ground, draw, twin), draw, ground.folder / "cache")
    length_s = time.monotonic() - began
    if said.code:
        if has_traceback(said.text) or RunDir(twin).exists():
            raise RuntimeError(f"never killed, and ended with {said.code}: {said.text[-1500:]}")
        return said.text.strip().splitlines()[-2] if said.text.count("\n") > 1 else said.text
    return [copy(ground, draw, number, length_s, dice) for number in range(draw.copies)]


def command(ground: Ground, draw: Draw, run: Path) -> list[str]:
    """The launch of a draw."""
    model = ground.gptq if draw.method in ("gptq-lora", "qa-lora") else ground.padded
    return ground.launch(run, "--model", str(model), *draw.flags)


def environment(ground: Ground, draw: Draw, cache: Path) -> dict[str, str]:
    """Temporary files lie in the draw's own folder, so that each process of it has the folder in its command line."""
    temporary = cache.parent / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    hidden = {} if draw.is_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return ground.environment({"QDIST_CACHE": str(cache), "TMPDIR": str(temporary), **hidden})


def run_on(ground: Ground, line: list[str], draw: Draw, cache: Path) -> Said:
    """A command to its end."""
    with open(cache.parent / "said", "w+") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment(ground, draw, cache))
        code = wait_for(process)
        return Said(code, (cache.parent / "said").read_text(errors="replace"))


def copy(ground: Ground, draw: Draw, number: int, length_s: float, dice: random.Random) -> Row:
    """One to three kills of the same run, each at a drawn moment of a command's life, then to the end."""
    place = ground.folder / f"copy{number}"
    place.mkdir()
    run, is_cold = RunDir(place / "run"), dice.random() < 0.5
    cache = place / "cache"
    if not is_cold:
        subprocess.run(["cp", "-a", str(ground.folder / "cache"), str(cache)], check=True)
    row = Row((), [], [], [], [])
    for _ in range(dice.choice((1, 1, 2, 3))):
        if (line := again(ground, draw, run)) is None:
            break
        what = struck(ground, line, draw, cache, dice.uniform(0.0, length_s), dice, row)
        row = row._replace(kills=(*row.kills, *filter(None, [what])))
    if not row.kills and run.result() is not None and length_s > 1:  # it was faster than its twin
        shutil.rmtree(place)
        return copy(ground, draw, number, 0.7 * length_s, dice)
    while (line := again(ground, draw, run)) is not None:
        said = run_on(ground, line, draw, cache)
        note_traceback(row, line, said)
        if said.code:
            row.failed.append(f"{' '.join(line[2:5])} ended with {said.code}: {' '.join(said.text.split())[-400:]}")
            break
    else:
        row.differ.extend(differences(run, RunDir(ground.folder / "twin")))
        row.differ.extend(f"left: {name}" for name in litter(place))
    return row


def again(ground: Ground, draw: Draw, run: RunDir) -> list[str] | None:
    """What a user types next; None for a run that is finished."""
    if run.result() is not None and run.adapter.is_dir():
        return None
    if run.exists():
        return qdist("launch", "--resume", "--run", str(run.path))
    return command(ground, draw, run.path)


def struck(
    ground: Ground, line: list[str], draw: Draw, cache: Path, moment: float, dice: random.Random, row: Row
) -> str:
    """Start a command, kill something of it at a moment, and see that all of it ends; empty where it ended before."""
    place, said = str(cache.parent), cache.parent / "said"
    with open(said, "w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment(ground, draw, cache))
    end = time.monotonic() + moment
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    what = ""
    if process.poll() is None:
        victim = dice.choice(VICTIMS)
        what = f"{victim} at {moment:.1f} s of {kill(place, process, victim, dice)}"
    code = wait_for(process)
    if code is None:
        row.failed.append(f"{what}: the launcher did not end within {LONGEST_S:.0f} s")
        code = -1
    note_traceback(row, line, Said(code, said.read_text(errors="replace")))
    row.orphans.extend(f"{what}: orphan {orphan[:160]}" for orphan in put_down(place, ORPHANED_S))
    return what


def kill(place: str, launcher: "subprocess.Popen[bytes]", victim: str, dice: random.Random) -> str:
    """SIGKILL to the victims, or to the launcher where there is none of them; which processes there were."""
    kinds = {pid: kind(line) for pid, line in processes(place).items()} | {launcher.pid: "launcher"}
    chosen = [pid for pid, what in kinds.items() if victim in (what, "all")] or [launcher.pid]
    if victim == "rank":
        chosen = [dice.choice(chosen)]
    for pid in chosen:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    return ", ".join(f"{count} {what}" for what, count in sorted(Counter(kinds.values()).items()))


def kind(line: str) -> str:
    """What a process of a launch is, by its command line."""
    if "qdist.host.launch.agent" in line or "launch.sh" in line:
        return "agent"
    if "qdist.runtime.train.worker" in line:
        return "rank"
    return "preparing" if "qdist.runtime" in line else "launcher" if "qdist launch" in line else "other"


def put_down(place: str, within_s: float) -> list[str]:
    """Command lines of what is still there after a while; it is ended, so that the next trial is alone."""
    found = left(place, within_s)
    for pid in found:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    return list(found.values())


def wait_for(process: "subprocess.Popen[bytes]") -> Any:
    """Its exit code; None for one that had to be ended after too long."""
    try:
        return process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def has_traceback(text: str) -> bool:
    """Whether a command showed its user the inside of Python."""
    return "Traceback (most recent call last)" in text


def note_traceback(row: Row, line: list[str], said: Said) -> None:
    """Keep the end of a traceback that a command showed."""
    if has_traceback(said.text):
        row.tracebacks.append(f"{' '.join(line[2:5])} showed a traceback: {' '.join(said.text.split())[-500:]}")


def differences(run: RunDir, twin: RunDir) -> list[str]:
    """In what a run is another than its twin."""
    found = []
    ours, theirs = (losses(decode_lines(each.event_file(0).read_bytes())) for each in (run, twin))
    if ours != theirs:
        steps = [step for step in theirs if ours.get(step) != theirs[step]]
        found.append(f"{len(steps)} of {len(theirs)} losses differ, the first at step {min(steps, default=-1)}")
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    if run.checkpoint_steps() != twin.checkpoint_steps():
        found.append(f"checkpoints of steps {run.checkpoint_steps()}, not {twin.checkpoint_steps()}")
    for step in set(run.checkpoint_steps()) & set(twin.checkpoint_steps()):
        folder = run.checkpoint(step).relative_to(run.path)
        names += [f"{folder}/{name}" for name in ("adapter.safetensors", "optimizer.safetensors", "state.json")]
    found += [f"{name} differs" for name in names if content(run.path / name) != content(twin.path / name)]
    result, wanted = run.result() or {}, twin.result() or {}
    return found + [f"result: {key}" for key in ("steps", "held_out", "answers") if result.get(key) != wanted.get(key)]


def content(path: Path) -> object:
    """What must be equal of a file: of safetensors type, shape and bits of each tensor, whatever their order."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if path.suffix != ".safetensors":
        return raw
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (own["dtype"], own["shape"], hashlib.sha256(raw[start + first : start + last]).hexdigest())
        for name, own in header.items()
        for first, last in (own["data_offsets"],)
    }


def litter(place: Path) -> list[str]:
    """Hidden and unfinished names in run, cache and temporary folder of a copy, locks left out."""
    kept = (".lock", ".gather.lock")
    found = [path for path in place.rglob("*") if path.name.startswith(".") or path.suffix in (".part", ".unfinished")]
    found += list((place / "tmp").glob("qdist-*"))
    return sorted(str(path.relative_to(place)) for path in found if not path.name.endswith(kept))


def summary(rows: list[tuple[Draw, Row]], refused: int) -> str:
    """Totals by layout, by method and by what was killed first."""
    head = ("", "runs", "kills", "differ", "orphans", "tracebacks", "failed")

    def line(name: str, own: list[Row]) -> tuple[object, ...]:
        lists = ([row.differ, row.orphans, row.tracebacks, row.failed] for row in own)
        counts = [sum(map(bool, column)) for column in zip(*lists, strict=True)] or [0] * 4
        return (name, len(own), sum(len(row.kills) for row in own), *counts)

    lines = [line(layout, [row for draw, row in rows if draw.layout == layout])
             for layout in sorted({draw.layout for draw, _ in rows})]  # fmt: skip
    lines += [line(name, [row for draw, row in rows if draw.method == name]) for name in METHODS]
    lines += [line(f"{name} killed", [row for _, row in rows if any(kill.startswith(name) for kill in row.kills)])
              for name in VICTIMS]  # fmt: skip
    lines.append(line("all", [row for _, row in rows]))
    return f"\n{table(head, lines)}" + (f"\n{refused} draws have no such run" if refused else "")


if __name__ == "__main__":
    main()
