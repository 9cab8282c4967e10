"""Gathers a checkpoint's adapter into a plain, checked PEFT folder, and writes a finished run's results."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from qdist.core.errors import RunError
from qdist.core.evaluation.course import Outcome
from qdist.core.planning.plan import Plan
from qdist.core.requests import Gather
from qdist.core.telemetry.events import start_of, steady_speed
from qdist.core.telemetry.inventory import Inventory, plain
from qdist.host.files import locked, publish_folder, replace_folder, write_atomic
from qdist.host.hub.card import write_card
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import PLAN, RESULT, RunDir
from qdist.host.sources.targets import ADAPTER, step_metadata, step_of
from qdist.host.terminal import say
from qdist.runtime.adapters.lora import peft_name
from qdist.runtime.adapters.registry import METHODS
from qdist.runtime.data.tokenizer import copy_beside, open_tokenizer
from qdist.runtime.engine.torch import Adapter
from qdist.runtime.exports.model_files import write_generation_config
from qdist.runtime.formats.checksum import slice_sums
from qdist.runtime.formats.packed_folder import entries_of, write_tensors
from qdist.runtime.formats.recorded_sums import ADAPTER_CONFIG, config_seal, require_adapter, sealed
from qdist.runtime.formats.work_folder import built
from qdist.runtime.infer.load import TOKENIZER, plan_of
from qdist.runtime.train.checkpoint import load, load_tensors
from qdist.runtime.train.measure import HeldMemory, Peak

_NEW, _BEFORE = ".adapter.new", ".adapter.old"
"""Names of the adapter being written, and briefly of the old one if the disk cannot swap the two."""
_LEFT = re.compile(r"\.adapter\.(new|old|\d+)")
"""What a killed process, even of an older qdist, leaves of them."""


def adapter_checksum(adapter: Adapter) -> tuple[int, ...]:
    """Two exact sums over the bits of all parameters; equal on ranks that hold the same adapter.

    Those of `slice_sums`, of all parameters one after the other, computed where each of them is.
    """
    total, position = torch.zeros(2, dtype=torch.int64, device=next(adapter.parameters()).device), 0
    for parameter in adapter.parameters():
        content = parameter.detach().contiguous().flatten().view(torch.uint8)
        total += slice_sums(content, position).to(total.device)
        position += content.numel()
    return tuple(total.tolist())


def gather(run: RunDir, *, step: int) -> Path:
    """Write `adapter/` from a step's checkpoint, for `PeftModel.from_pretrained`.

    Raises RunError when the adapter is empty, not finite, or never moved.
    """
    with _alone(run):
        _gather_here(run, step)
    return run.adapter


def gather_named(run: RunDir, which: str, *, out: Path | None = None) -> tuple[Path, int]:
    """`gather` for a checkpoint named `last`, `best` or by step; returns the folder and the step.

    out: write there instead; must not exist, or be an empty folder.
    """
    named = which if which == "best" else ""
    if out is None:
        with _alone(run):  # chosen within: the run itself may end meanwhile, and write its own
            step = choose_step(run, which)
            _gather_here(run, step, named=named)
        return run.adapter, step
    step = choose_step(run, which)
    with built(out, f"adapter of step {step} of {run.path.resolve()}") as work:
        _write_adapter(run, step, work, named=named)
        write_card(run, work, step=step)
    return out, step


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """A lock so that one process at a time writes or reads `adapter/`; clears what a killed one left."""
    with locked(run.path / ".gather.lock"):
        if not run.adapter.exists() and (run.path / _BEFORE).exists():
            os.rename(run.path / _BEFORE, run.adapter)
        for path in run.path.iterdir():
            if _LEFT.fullmatch(path.name):
                shutil.rmtree(path)
        yield


def _gather_here(run: RunDir, step: int, *, named: str = "") -> None:
    beside = run.path / _NEW
    beside.mkdir()
    try:
        _write_adapter(run, step, beside, named=named)
        write_card(run, beside, step=step, before=run.adapter)
    except BaseException:
        shutil.rmtree(beside)
        raise
    replace_folder(beside, run.adapter, aside=run.path / _BEFORE)


def _write_adapter(run: RunDir, step: int, folder: Path, *, named: str) -> None:
    plan = plan_of(run)
    _, state = load(run.checkpoint(step))
    tensors = {peft_name(name): tensor for name, tensor in state.parameters.items()}
    check_adapter(tensors, where=str(run.checkpoint(step)))
    metadata = METHODS[plan.spec.method].metadata(plan) | step_metadata(step, plan.steps, checkpoint=named)
    write_beside(folder, plan)
    metadata |= config_seal((folder / ADAPTER_CONFIG).read_text())
    write_tensors(folder, ADAPTER, entries_of(tensors), metadata=sealed(tensors, metadata))
    (folder / f".{ADAPTER}.json").unlink()


def write_beside(folder: Path, plan: Plan) -> None:
    """Write what accompanies an adapter's tensors: configurations, and the run's tokenizer."""
    (folder / ADAPTER_CONFIG).write_text(_adapter_config(plan))
    if plan.source.tokenizer:
        tokenizer = Path(plan.source.tokenizer)
        if not tokenizer.is_dir():
            raise RunError("the run's tokenizer is gone from the cache", try_="a new run on the same model and data")
        for path in sorted(tokenizer.iterdir()):
            if path.name not in (ADAPTER, ADAPTER_CONFIG):  # where it is the adapter's copy
                copy_beside(path, folder)
        write_generation_config(folder, plan)


def rehearse(run: RunDir) -> None:
    """Do all of `gather` except the tensors, into a temporary folder: a run that cannot be gathered must not start.

    Files that gathering needs are copied into the run, in case the cache is emptied.
    """
    plan = plan_of(run)
    with tempfile.TemporaryDirectory(prefix=".rehearsal.", dir=run.path) as folder:
        write_beside(Path(folder), plan)
        if plan.source.tokenizer:
            open_tokenizer(Path(folder), "the tokenizer that is saved with the adapter cannot be opened again")
            _keep_tokenizer(run, Path(folder), Path(plan.source.tokenizer))


def _keep_tokenizer(run: RunDir, beside: Path, tokenizer: Path) -> None:
    """Copy the tokenizer into the run, unless it is there."""
    kept = run.path / TOKENIZER
    if not kept.is_dir():
        whole = beside / TOKENIZER
        shutil.copytree(tokenizer, whole)
        publish_folder(whole, kept)


def check_adapter(tensors: dict[str, torch.Tensor], *, where: str) -> None:
    """Refuse an adapter that cannot have learned anything."""
    if not tensors:
        raise RunError(f"the adapter in {where} has no tensors", try_="another checkpoint")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise RunError(
                f"{bad} of {tensor.numel()} values of {name} in {where} are NaN or infinite",
                try_="an earlier checkpoint",
            )
    outputs = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if outputs and not any(bool(tensor.any()) for tensor in outputs):
        raise RunError(
            f"every lora_B in {where} is zero: the adapter changes nothing", try_="more steps, or a larger optim.lr"
        )


def _adapter_config(plan: Plan) -> str:
    """PEFT's adapter_config.json, written by PEFT."""
    from qdist.runtime.adapters.attach import lora_config

    config = lora_config(plan)
    config.inference_mode = True
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(settings, indent=2, default=str) + "\n"


def write_result(
    run: RunDir,
    plan: Plan,
    outcome: Outcome,
    *,
    answers: list[dict[str, str]],
    peaks: Sequence[Sequence[Peak]],
    held: Sequence[HeldMemory],
    inventory: Inventory | None = None,
) -> None:
    """Write `result.json`, which marks the run as finished.

    outcome: how training went. peaks: of each rank, on each of its GPUs. held: of each rank, after the last step.
    inventory: of the launch that finished the run.
    """
    with _alone(run):
        require_adapter(run.adapter)
        tensors, size = load_tensors(run.adapter / ADAPTER), (run.adapter / ADAPTER).stat().st_size
    events = Follower(run.path).new_events()
    start = start_of(events, planned_at=(run.path / PLAN).stat().st_mtime)
    speed = steady_speed(event for event in events if event.rank == 0)
    result = {
        "steps": outcome.steps,
        "ended_early": outcome.ended_early,
        "held_out": [list(point) for point in outcome.held_out],
        "tasks": {task: [list(point) for point in points] for task, points in outcome.tasks.items()},
        "answers": answers,
        "adapter_bytes": size,
        "adapter_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "peak_bytes": peaks[0][0]._asdict(),
        "peaks": [[peak._asdict() for peak in of_rank] for of_rank in peaks],
        "held": [own._asdict() for own in held],
        "tokens_per_s": {
            "predicted": plan.tokens_per_second,
            "measured": speed.tokens_s,
        },
        "positions_per_s": {"predicted": plan.positions_per_second, "measured": speed.positions_s},
        "start_seconds": {"load": start.load_s, "first_step": start.first_step_s},
        "loading": {"seconds": start.loading_s, "read_bytes": start.read_bytes},
        "starting": start.phases,
        "own_code": plan.source.own_code or None,
        "inventory": plain(inventory) if inventory else None,
        # Of the launch that did the first steps.
        "gradients": next((event.note for event in reversed(events) if event.kind == "gradients"), ""),
    }
    write_atomic(run.path / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    with _alone(run):
        write_card(run, run.adapter)  # with what was measured


def choose_step(run: RunDir, which: str) -> int:
    """The step that `last`, `best` or a number names. Raises RunError listing the available steps."""
    named = step_of(run, which)
    if named is not None:
        return named
    steps = run.checkpoint_steps()
    progress, _ = load(run.checkpoint(steps[-1]))
    if progress.best_step in steps:
        return progress.best_step
    raise RunError(
        f"{run.path} was never evaluated at a checkpoint",
        try_="--checkpoint last; `best` needs --set train.eval_steps=N at launch",
    )


def run(request: Gather) -> None:
    """Gather an adapter and report on it."""
    run = RunDir(request.run)
    folder, step = gather_named(run, request.checkpoint, out=Path(request.out) if request.out else None)
    require_adapter(folder, run=run.path)
    tensors = load_tensors(folder / ADAPTER)
    total, parameters = run.plan().steps, sum(tensor.numel() for tensor in tensors.values())
    say(f"{folder}: step {step} of {total}, {len(tensors)} tensors, {parameters:,} parameters")
    if request.out is None and step != total:
        say(f"note     it is not the run's last step: commands that use {run.path} say so until it is gathered again")
