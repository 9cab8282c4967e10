"""Checkpoints independent of the world size: complete on disk or absent, readable on any number of ranks."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace
from safetensors import SafetensorError

from qdist.core.errors import JobError, RunError
from qdist.core.evaluation.course import Points, best_step, points_of
from qdist.core.spec.sections import LOSS
from qdist.core.text import quoted, resuming
from qdist.host.files import publish_folder, write_atomic
from qdist.host.opening import read_typed, require_file, told
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.torch import State
from qdist.runtime.formats.checksum import file_checksum

_FILES = ("state.json", "adapter.safetensors", "optimizer.safetensors")
"""Files that DONE covers."""
_HELD_OUT = "held_out.json"
"""File next to those that DONE covers, with the evaluation made after the checkpoint was written."""
_LEFT = re.compile(r"\.step_\d{6,}\.\d+")
"""Names of checkpoints being written or deleted."""


class _Closed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of DONE: each file's bytes, and the two sums of `qdist.runtime.formats.checksum`."""

    files: dict[str, tuple[int, int, int]]


class _HeldOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The contents of `held_out.json`."""

    held_out: Points
    sha256: str
    """SHA-256 of the points as JSON."""
    tasks: dict[str, Points] = {}
    best: str = LOSS
    rising: tuple[str, ...] = ()


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's progress after `step` optimizer steps. Generators need no state: they are seeded from (seed, step)."""

    step: int
    samples: int
    """Position in the endless stream of training samples."""
    optimizer_steps: int = 0
    loss_scale: float = 1.0
    finite_steps: int = 0
    """Steps since the loss scale last changed."""
    held_out: Points = ()
    """(step, loss) of every evaluation so far."""
    tasks: dict[str, Points] = {}
    """(step, figure) of every evaluation so far, by task."""
    best: str = LOSS
    """What the best checkpoint is chosen by: loss, or one of the tasks."""
    rising: tuple[str, ...] = ()
    """Tasks of whose figure more is better."""

    @property
    def best_step(self) -> int | None:
        """The evaluated step with the best figure, excluding the start of the run."""
        return best_step(points_of(self.best, self.held_out, self.tasks), rises=self.best in self.rising)


def save(run: RunDir, progress: Progress, state: State, *, keep: int) -> Path:
    """Write one checkpoint, then delete the oldest beyond `keep` and the best. Call on one rank only."""
    final = run.checkpoint(progress.step)
    if (final / "DONE").is_file():
        return final
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    beside = run.checkpoints / f".{final.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)  # a killed rank of the same process id, as in a restarted container
    _remove(final)
    beside.mkdir()
    try:
        _write(beside, progress, state)
        publish_folder(beside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise JobError(
            f"the checkpoint of step {progress.step} cannot be written to {run.checkpoints}: {error}; "
            f"{run.last_saved()}",
            try_=f"make room there, then {resuming(run.path)}",
        ) from error
    prune(run, keep=keep, best=progress.best_step)
    return final


def note(run: RunDir, progress: Progress, *, keep: int) -> None:
    """Add to a step's checkpoint the evaluation that followed it, then keep only the new best beyond `keep`."""
    # A file of its own: DONE holds the sums of the others, and two files cannot be replaced at the same moment.
    found = _HeldOut(progress.held_out, "", progress.tasks, progress.best, progress.rising)
    content = msgspec.json.encode(replace(found, sha256=_digest(found)))
    write_atomic(run.checkpoint(progress.step) / _HELD_OUT, content, inside=run.checkpoints)
    prune(run, keep=keep, best=progress.best_step)


def _digest(found: _HeldOut) -> str:
    parts = [found.held_out, found.tasks, found.best, found.rising] if found.tasks else found.held_out
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _encoded(progress: Progress) -> bytes:
    return msgspec.json.format(msgspec.json.encode(progress), indent=2) + b"\n"


def _write(folder: Path, progress: Progress, state: State) -> None:
    _save_tensors(state.parameters, folder / "adapter.safetensors")
    flat = {f"{moment}.{name}": tensor for moment, tensors in state.moments.items() for name, tensor in tensors.items()}
    _save_tensors(flat, folder / "optimizer.safetensors")
    (folder / "state.json").write_bytes(_encoded(progress))
    closed = _Closed({name: _size_and_sums(folder / name) for name in _FILES})
    (folder / "DONE").write_bytes(msgspec.json.encode(closed))


def _size_and_sums(file: Path) -> tuple[int, int, int]:
    return file.stat().st_size, *file_checksum(file)


def load(path: Path) -> tuple[Progress, State]:
    """Read a checkpoint. Raises RunError if it is incomplete or changed, suggesting the one before."""
    if not (path / "DONE").is_file():
        raise RunError(f"{path} has no DONE: it was not finished", try_=_other(path))
    _require_closed(path)
    progress = read_typed(path / "state.json", Progress, RunError, try_=_other(path))
    if (path / _HELD_OUT).is_file():
        said = read_typed(path / _HELD_OUT, _HeldOut, RunError, try_=_other(path))
        if said.sha256 != _digest(said):
            raise RunError(f"{path / _HELD_OUT} is not as it was saved", try_=_other(path))
        progress = replace(progress, held_out=said.held_out, tasks=said.tasks, best=said.best, rising=said.rising)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(path / "optimizer.safetensors").items():
        moment, _, name = key.partition(".")
        moments.setdefault(moment, {})[name] = tensor
    return progress, State(load_tensors(path / "adapter.safetensors"), moments, progress.optimizer_steps)


def _require_closed(path: Path) -> None:
    """Raise RunError for a file whose sums differ from DONE's; an empty DONE is from a qdist that recorded none."""
    if not (path / "DONE").stat().st_size:
        return
    closed = read_typed(path / "DONE", _Closed, RunError, try_=_other(path)).files
    if set(closed) != set(_FILES):
        raise RunError(f"{path / 'DONE'} is not as it was saved", try_=_other(path))
    for name, said in closed.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"{path} has no {name}", try_=_other(path))
        if _size_and_sums(file) != said:
            raise RunError(f"{file} is not as it was saved: its bytes have other sums", try_=_other(path))


def _other(path: Path) -> str:
    """How to go on without this checkpoint."""
    run = RunDir(path.parent.parent)
    steps = [step for step in run.checkpoint_steps() if run.checkpoint(step) != path]
    rest = f"the newest checkpoint is then that of step {steps[-1]}" if steps else "the run then begins anew"
    return f"{quoted('mv', path, run.path / f'broken-{path.name}')}: {rest}"


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's or adapter's safetensors file. Raises RunError if it is cut short."""
    from safetensors.torch import load_file

    require_file(path, RunError, try_=_other(path.parent))
    with told(f"{path} cannot be read", RunError, try_=_other(path.parent)):
        return load_file(path)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def prune(run: RunDir, *, keep: int, best: int | None) -> None:
    """Delete the oldest beyond `keep` and the best, and what a killed process left half-written or half-deleted."""
    for path in run.checkpoints.iterdir():
        if _LEFT.fullmatch(path.name):
            shutil.rmtree(path)
    for step in run.checkpoint_steps()[:-keep]:
        if step != best:
            _remove(run.checkpoint(step))


def _remove(folder: Path) -> None:
    """Delete a folder, hiding it first: a kill in the middle leaves no half checkpoint."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        os.rename(folder, aside)
        shutil.rmtree(aside)
