"""Gathers a checkpoint's adapter into a plain PEFT folder, checked, and writes what a finished run ends with."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from qdist.core.errors import QdistError, RunError
from qdist.core.events import start_of, steady_tokens_s
from qdist.core.plan import Plan
from qdist.host.files import publish_folder, write_atomic
from qdist.host.follow import Follower
from qdist.host.rundir import PLAN, RESULT, RunDir
from qdist.runtime.checkpoint import load, load_tensors
from qdist.runtime.checksum import slice_sums
from qdist.runtime.engine import Adapter
from qdist.runtime.exports.model_files import write_generation_config
from qdist.runtime.load import plan_of
from qdist.runtime.measure import Parts, Peak
from qdist.runtime.packed_folder import entries_of, write_tensors
from qdist.runtime.tokenizer import copy_beside, open_tokenizer

_TENSORS = "adapter_model.safetensors"


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
    """Write `adapter/` from the checkpoint of a step: what `PeftModel.from_pretrained` loads.

    Raises RunError when the adapter is empty, not finite, or never moved.
    """
    plan = plan_of(run)
    _, state = load(run.checkpoint(step))
    tensors = {_peft_name(name): tensor for name, tensor in state.parameters.items()}
    check_adapter(tensors, where=str(run.checkpoint(step)))
    beside = run.path / f".adapter.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    pooling = {"pool": plan.spec.lora.pool, "pool_group_size": str(plan.pool)} if plan.pool > 1 else {}
    write_tensors(beside, _TENSORS, entries_of(tensors), metadata=pooling)
    (beside / f".{_TENSORS}.json").unlink()
    write_beside(beside, plan)
    _replace_folder(beside, run.adapter)
    return run.adapter


def write_beside(folder: Path, plan: Plan) -> None:
    """What an adapter folder holds beside its tensors: configurations, and the run's tokenizer."""
    (folder / "adapter_config.json").write_text(_adapter_config(plan))
    if plan.source.tokenizer:
        for path in sorted(Path(plan.source.tokenizer).iterdir()):
            copy_beside(path, folder)
        write_generation_config(folder, plan)


def rehearse(run: RunDir) -> None:
    """Do all of `gather` but for the tensors, into a folder that is thrown away: what cannot be gathered at the end of
    a run is no run to start.
    """
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=run.path) as folder:
        write_beside(Path(folder), plan_of(run))
        if plan_of(run).source.tokenizer:
            open_tokenizer(Path(folder), "the tokenizer that is saved with the adapter cannot be opened again")


def check_adapter(tensors: dict[str, torch.Tensor], *, where: str) -> None:
    """Refuse an adapter that cannot have learnt anything."""
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


def _peft_name(name: str) -> str:
    """A parameter's name as PEFT stores it: without the adapter's own name."""
    return (
        name.replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
        .replace(".token_adapter.trainable_tokens_delta.default", ".token_adapter.trainable_tokens_delta")
    )


def _adapter_config(plan: Plan) -> str:
    """PEFT's adapter_config.json, written by PEFT."""
    from qdist.runtime.methods.lora import lora_config

    config = lora_config(plan)
    config.inference_mode = True
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(settings, indent=2, default=str) + "\n"


def _replace_folder(beside: Path, final: Path) -> None:
    """Swap a finished folder in; the one it replaces was made by the same run."""
    old = final.with_name(f".{final.name}.old.{os.getpid()}")
    if final.exists():
        os.rename(final, old)
    publish_folder(beside, final)
    shutil.rmtree(old, ignore_errors=True)


def write_result(
    run: RunDir,
    plan: Plan,
    *,
    held_out: tuple[tuple[int, float], ...],
    answers: list[dict[str, str]],
    peaks: Sequence[Sequence[Peak]],
    held: Sequence[Parts],
) -> None:
    """Write `result.json`, which makes the run finished.

    peaks: of each rank, on each of its GPUs. held: of each rank, after the last step.
    """
    tensors = load_tensors(run.adapter / _TENSORS)
    events = Follower(run.path).new_events()
    start = start_of(events, planned_at=(run.path / PLAN).stat().st_mtime)
    result = {
        "steps": plan.steps,
        "held_out": [list(point) for point in held_out],
        "answers": answers,
        "adapter_bytes": (run.adapter / _TENSORS).stat().st_size,
        "adapter_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "peak_bytes": peaks[0][0]._asdict(),
        "peaks": [[peak._asdict() for peak in of_rank] for of_rank in peaks],
        "held": [own._asdict() for own in held],
        "tokens_per_s": {
            "predicted": plan.tokens_per_second,
            "measured": steady_tokens_s(event for event in events if event.rank == 0),
        },
        "start_seconds": {"load": start.load_s, "first_step": start.first_step_s},
        "loading": {"seconds": start.loading_s, "read_bytes": start.read_bytes},
    }
    write_atomic(run.path / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def choose_step(run: RunDir, which: str) -> int:
    """The step that `last`, `best` or a number names. Raises RunError listing the steps there are."""
    steps = run.checkpoint_steps()
    if which == "best":
        progress, _ = load(run.checkpoint(steps[-1]))
        best = progress.best_step
        if best in steps:
            return best
        raise RunError(
            f"{run.path} was never evaluated at a checkpoint",
            try_="--checkpoint last; `best` needs --set train.eval_steps=N at launch",
        )
    if which != "last" and (not which.isdigit() or int(which) not in steps):
        raise RunError(
            f"{run.path} has no checkpoint {which!r}", try_=f"last, best, or one of {', '.join(map(str, steps))}"
        )
    return steps[-1] if which == "last" else int(which)


def main() -> None:
    """`python -m qdist.runtime.export gather RUN`, started by the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("gather",))
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="last")
    arguments = parser.parse_args()
    run = RunDir(arguments.run)
    try:
        step = choose_step(run, arguments.checkpoint)
        folder = gather(run, step=step)
    except QdistError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    tensors = load_tensors(folder / _TENSORS)
    total, parameters = run.plan().steps, sum(tensor.numel() for tensor in tensors.values())
    print(f"{folder}: step {step} of {total}, {len(tensors)} tensors, {parameters:,} parameters")


if __name__ == "__main__":
    main()
