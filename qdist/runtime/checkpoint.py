"""Checkpoints free of the world size: whole on disk or absent, read back on any number of ranks."""

import os
import shutil
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError

from qdist.core.errors import JobError, RunError
from qdist.core.quoting import resuming
from qdist.host.files import publish_folder, write_atomic
from qdist.host.opening import read_typed, require_file, told
from qdist.host.rundir import RunDir
from qdist.runtime.engine import State

_OTHER = "take its folder away: a run goes on from the newest checkpoint that is there"


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run stands after `step` optimizer steps. Generators need no state: they are seeded from (seed, step)."""

    step: int
    samples: int
    """Position in the endless stream of training samples."""
    optimizer_steps: int = 0
    loss_scale: float = 1.0
    finite_steps: int = 0
    """Steps since the loss scale last changed."""
    held_out: tuple[tuple[int, float], ...] = ()
    """(step, loss) of every evaluation so far."""

    @property
    def best_step(self) -> int | None:
        """The evaluated step with the lowest held-out loss, the start of the run left out."""
        trained = [(loss, step) for step, loss in self.held_out if step > 0]
        return min(trained)[1] if trained else None


def save(run: RunDir, progress: Progress, state: State, *, keep: int) -> Path:
    """Write one checkpoint, then delete the oldest beyond `keep` and the best. For one rank only."""
    final = run.checkpoint(progress.step)
    if (final / "DONE").is_file():
        return final
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    _remove(final)
    beside = run.checkpoints / f".{final.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)  # a killed rank of the same process id, as in a restarted container
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
    _prune(run, keep=keep, best=progress.best_step)
    return final


def note(run: RunDir, step: int, held_out: tuple[tuple[int, float], ...], *, keep: int) -> None:
    """Add the evaluation that followed a checkpoint to it; then only the new best is kept beyond `keep`."""
    state = run.checkpoint(step) / "state.json"
    progress = msgspec.structs.replace(read_typed(state, Progress, RunError, try_=_OTHER), held_out=held_out)
    write_atomic(state, _encoded(progress))
    _prune(run, keep=keep, best=progress.best_step)


def _encoded(progress: Progress) -> bytes:
    return msgspec.json.format(msgspec.json.encode(progress), indent=2) + b"\n"


def _write(folder: Path, progress: Progress, state: State) -> None:
    _save_tensors(state.parameters, folder / "adapter.safetensors")
    flat = {f"{moment}.{name}": tensor for moment, tensors in state.moments.items() for name, tensor in tensors.items()}
    _save_tensors(flat, folder / "optimizer.safetensors")
    (folder / "state.json").write_bytes(_encoded(progress))
    (folder / "DONE").touch()


def load(path: Path) -> tuple[Progress, State]:
    """Read a checkpoint. Raises RunError when it is not whole."""
    if not (path / "DONE").is_file():
        raise RunError(f"{path} has no DONE: it was not finished", try_=_OTHER)
    progress = read_typed(path / "state.json", Progress, RunError, try_=_OTHER)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(path / "optimizer.safetensors").items():
        moment, _, name = key.partition(".")
        moments.setdefault(moment, {})[name] = tensor
    return progress, State(load_tensors(path / "adapter.safetensors"), moments, progress.optimizer_steps)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, whole. Raises RunError when it is cut short."""
    from safetensors.torch import load_file

    require_file(path, RunError, try_=_OTHER)
    with told(f"{path} cannot be read", RunError, try_=_OTHER):
        return load_file(path)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _prune(run: RunDir, *, keep: int, best: int | None) -> None:
    for step in run.checkpoint_steps()[:-keep]:
        if step != best:
            _remove(run.checkpoint(step))
    for leftover in run.checkpoints.glob(".step_*"):
        shutil.rmtree(leftover)


def _remove(folder: Path) -> None:
    """DONE goes first, so that a kill in the middle leaves no half checkpoint that looks whole."""
    if folder.exists():
        (folder / "DONE").unlink(missing_ok=True)
        shutil.rmtree(folder)
