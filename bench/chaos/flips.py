"""One bit flipped at random in each kind of file that is read: is it named, or proved harmless?

    python -m bench.chaos.flips [--count 200] [--seed 0] [--kinds packed tokens ...] [--commands 1]

Each flip is put before the reader that the commands use, in this process, and undone. named: an error of ours, which is
a sentence. harmless: what was read is equal to what is read without it. Of each kind that a command reads, `--commands`
flips go through the whole command as well. Exit code 1 where one was neither. 200 of each take about three minutes.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import torch
from msgspec.structs import replace
from safetensors import SafetensorError

from bench.chaos.ground import Ground, has_traceback, qdist, table
from qdist.core.errors import QdistError
from qdist.host.run.rundir import RunDir
from qdist.host.sources.cache import CHECKSUMS
from qdist.host.sources.targets import step_note
from qdist.runtime.data.tokenized import load as load_tokens
from qdist.runtime.engine.adamw import MOMENTS
from qdist.runtime.engine.torch import State
from qdist.runtime.exports.qalora_merge import merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.checksum import tensor_checksum
from qdist.runtime.formats.recorded_sums import keep_computed_sums
from qdist.runtime.infer.load import load, plan_of, with_packed
from qdist.runtime.model import weights
from qdist.runtime.model.skeleton import DTYPES, load_backbone
from qdist.runtime.quantize.source import blueprint, tensors_of
from qdist.runtime.train import checkpoint
from qdist.runtime.train.result import gather
from tests.runtime.tiny import adapted_run, real_job

Read = Callable[[], object]
"""Reads all that there is; equal results are equal contents. Raises QdistError."""


_TRACEBACKS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, msgspec.MsgspecError,
)  # fmt: skip
"""What a user would see the inside of Python with."""


class Kind(NamedTuple):
    """Files of a kind, and what reads them."""

    files: tuple[Path, ...]
    read: Read
    command: tuple[str, ...] = ()
    """Of qdist, that must end with a sentence; empty where the reader is not a command's alone."""


class Flip(NamedTuple):
    """A bit of a file."""

    file: Path
    byte: int
    bit: int

    def __str__(self) -> str:
        return f"{self.file.name} byte {self.byte} bit {self.bit}"


class Outcome(NamedTuple):
    """What became of flips."""

    named: int
    harmless: int
    unseen: tuple[Flip, ...]
    """Or shown as a traceback."""


def kinds(ground: Ground) -> dict[str, Kind]:
    """All of them, over a tiny model. Everything is made where it is not there."""
    run, gptq, qalora = _plain_run(ground), _gptq_run(ground), _merged(ground)
    plan = run.plan()
    assert plan.data is not None
    packed, tokens, step = Path(plan.source.packed), Path(plan.data.path), run.checkpoint(plan.steps)
    converted = _converted(ground)
    out = str(ground.folder / "never")
    return {
        "packed": Kind(
            (*_tensors(packed), packed / "qdist.json"), lambda: _backbone(run), ("merge", str(run.path), "--out", out)
        ),
        "adapter": Kind(
            (run.adapter / "adapter_model.safetensors", run.adapter / "adapter_config.json"), lambda: _adapter(run),
            ("export", str(run.path), "--to", "16bit", "--out", out),
        ),
        "optimizer": Kind(
            tuple(sorted(step.iterdir())), lambda: _checkpoint(step), ("gather", str(run.path), "--out", out)
        ),
        "offsets": Kind((*_tensors(qalora), qalora / CHECKSUMS), lambda: _state(load(qalora)[0])),
        "gptq": Kind(_tensors(Path(gptq.plan().source.packed)), lambda: _backbone(gptq)),
        "gguf": Kind((*_tensors(converted), converted / CHECKSUMS), lambda: _original(converted)),
        "tokens": Kind((tokens,), lambda: _tokens(tokens)),
    }  # fmt: skip


def flipped(kind: Kind, count: int, seed: int) -> Outcome:
    """Flip bits one at a time, files in turn, and read."""
    draw, whole = random.Random(seed), kind.read()
    named, harmless, unseen = 0, 0, list[Flip]()
    for number in range(count):
        flip = _drawn(kind.files[number % len(kind.files)], draw)
        with _Changed(flip):
            try:
                found = kind.read()
            except QdistError:
                named += 1
                continue
            except _TRACEBACKS:
                unseen.append(flip)
                continue
        if found == whole:
            harmless += 1
        else:
            unseen.append(flip)
    return Outcome(named, harmless, tuple(unseen))


def commanded(ground: Ground, kind: Kind, count: int, seed: int) -> Outcome:
    """The same through a whole command, which must end with exit code 2 and a sentence."""
    draw, unseen = random.Random(seed), list[Flip]()
    for _ in range(count if kind.command else 0):
        flip = _drawn(max(kind.files, key=lambda file: file.stat().st_size), draw)
        with _Changed(flip):
            done = subprocess.run(
                qdist(*kind.command), env=ground.environment(), check=False, capture_output=True, text=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        if done.returncode != 2 or has_traceback(done) or "error: " not in done.stderr:
            unseen.append(flip)
            print(done.stdout, done.stderr, file=sys.stderr)
        shutil.rmtree(ground.folder / "never", ignore_errors=True)
    return Outcome(count - len(unseen) if kind.command else 0, 0, tuple(unseen))


class _Changed:
    """A file with one bit flipped, within the block; its time stays, as on a disk that forgets."""

    def __init__(self, flip: Flip) -> None:
        self._flip, self._status = flip, flip.file.stat()

    def __enter__(self) -> None:
        self._turn()

    def __exit__(self, *_: object) -> None:
        self._turn()

    def _turn(self) -> None:
        with open(self._flip.file, "r+b") as file:
            file.seek(self._flip.byte)
            (byte,) = file.read(1)
            file.seek(self._flip.byte)
            file.write(bytes((byte ^ (1 << self._flip.bit),)))
        os.utime(self._flip.file, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))


def _drawn(file: Path, draw: random.Random) -> Flip:
    return Flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))


def _tensors(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("*.safetensors")))


def _sums(tensors: Any) -> list[tuple[str, object]]:
    return [(name, (str(own.dtype), list(own.shape), tensor_checksum(own))) for name, own in sorted(tensors.items())]


def _state(model: Any) -> object:
    return _sums({**model.state_dict(), **dict(model.named_buffers())})


def _backbone(run: RunDir) -> object:
    plan, device = plan_of(run), torch.device("cpu")
    # The fingerprint covers all of a file as small as these, and not of a real one: the sums have to see it.
    bare = msgspec.structs.replace(plan.source, fingerprint="")
    source = with_packed(msgspec.structs.replace(plan, source=bare))
    with mock.patch.object(weights, "_COPIED_ELEMENTS", 1 << 8):  # matrices are mapped, as large ones are
        return _state(
            load_backbone(
                source, bits=plan.spec.bits, quant=plan.spec.quant, dtype=DTYPES[plan.compute_dtype], device=device,
                facts=plan.facts,
            )
        )  # fmt: skip


def _adapter(run: RunDir) -> object:
    adapters = Adapters([run])
    updates = {path: adapters.of(path) for path in sorted(adapters.paths)}
    factors = [[(term.factor, term.pool) for term in update.terms] for update in updates.values() if update]
    held = {f"{p}.{s}": getattr(t, s) for p, u in updates.items() if u for t in u.terms for s in ("up", "down")}
    return _sums(held), factors, step_note(run)


def _checkpoint(folder: Path) -> object:
    progress, state = checkpoint.load(folder)
    return progress, _sums(state.parameters), [(moment, _sums(own)) for moment, own in sorted(state.moments.items())]


def _original(folder: Path) -> object:
    shape = blueprint(folder)
    tensors = tensors_of(folder, shape)
    return _sums({name: tensors.read(name) for name in shape.shapes})


def _tokens(file: Path) -> object:
    found = load_tokens(file, key=file.stem)
    return _sums({"tokens": found.tokens, "labels": found.labels, "offsets": found.offsets}), found.summary


def _plain_run(ground: Ground) -> RunDir:
    """Packed to NF4, with a checkpoint that was evaluated after it was written, and its adapter."""
    run = RunDir(ground.folder / "plain")
    if not run.adapter.is_dir():
        adapted_run(real_job(ground.model, ground.data, run.path, seq_len=32))
        steps = run.plan().steps
        progress, state = checkpoint.load(run.checkpoint(steps))
        moments = {moment: {name: torch.rand_like(own) for name, own in state.parameters.items()} for moment in MOMENTS}
        shutil.rmtree(run.checkpoint(steps))
        checkpoint.save(run, progress, State(state.parameters, moments, steps), keep=1)
        checkpoint.note(run, replace(progress, held_out=((0, 2.0), (steps, 1.5))), keep=1)
        gather(run, step=steps)
    return run


def _gptq_run(ground: Ground) -> RunDir:
    """Over a checkpoint of somebody else's, which says nothing of its sums."""
    (ground.gptq / CHECKSUMS).unlink(missing_ok=True)
    run = RunDir(ground.folder / "over-gptq")
    if not run.adapter.is_dir():
        adapted_run(real_job(ground.gptq, ground.data, run.path, seq_len=32, method="gptq-lora"))
    return run


def _merged(ground: Ground) -> Path:
    """A QA-LoRA adapter merged exactly: a GPTQ checkpoint with offsets."""
    out, run = ground.folder / "with-offsets", RunDir(ground.folder / "qa-lora")
    if not out.is_dir():
        adapted_run(real_job(ground.gptq, ground.data, run.path, seq_len=32, method="qa-lora"))
        merge_offsets(Adapters([run]), out)
    return out


def _converted(ground: Ground) -> Path:
    """As the cache keeps what a GGUF file was converted to."""
    folder = ground.folder / "cache" / "models" / "converted"
    if not folder.is_dir():
        shutil.copytree(ground.model, folder)
        keep_computed_sums(folder)
    return folder


def _row(name: str, how: str, outcome: Outcome) -> tuple[object, ...]:
    return name, how, outcome.named, outcome.harmless, len(outcome.unseen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Flip, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--commands", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="flips-") as folder:
        ground = Ground(Path(folder))
        os.environ["QDIST_CACHE"] = str(ground.folder / "cache")
        rows, unseen = [], 0
        for name, kind in kinds(ground).items():
            if given.kinds and name not in given.kinds:
                continue
            outcomes = {"reader": flipped(kind, given.count, given.seed)}
            if kind.command:
                outcomes["command"] = commanded(ground, kind, given.commands, given.seed)
            for how, outcome in outcomes.items():
                rows.append(_row(name, how, outcome))
                unseen += len(outcome.unseen)
                for flip in outcome.unseen:
                    print(f"unseen: {name} by {how}: {flip}", file=sys.stderr, flush=True)
    print(table(("kind", "read by", "named", "harmless, proved", "unseen"), rows))
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
