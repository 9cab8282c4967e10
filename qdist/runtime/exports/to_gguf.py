"""A run's merged model as a GGUF file: QA-LoRA's integers as they are, in Q4_1; any method rounded to F16 or Q8_0."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import ModelError, RunError
from qdist.core.plan import Plan
from qdist.core.units import format_bytes
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.gguf import Affine, Kind, Make, write_gguf
from qdist.runtime.exports.gguf_check import check_gguf
from qdist.runtime.exports.job import Export
from qdist.runtime.exports.merged import Merged
from qdist.runtime.exports.update import Adapters
from qdist.runtime.gptq.bits import unpack, unpack_zeros
from qdist.runtime.methods.packed_gptq import PackedGptq
from qdist.runtime.work_folder import require_space, reserved

_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_1": 20 / 32}
"""A weight."""


def run(job: Export) -> None:
    """Write the file, read it back, and say how far it is from the merged model."""
    adapters = job.adapters
    plan = adapters.runs[0].plan()
    kind = job.type or ("q4_1" if not _why_not_q4_1(plan, adapters) else "f16")
    if kind == "q4_1" and (reason := _why_not_q4_1(plan, adapters)):
        raise RunError(f"{adapters.runs[0].path} cannot be Q4_1: {reason}", try_="--type q8_0, or f16")
    backbone = Backbone(plan, onto=job.onto)
    tensors = dict(_tensors(backbone, adapters, kind))
    config = backbone.model.config.to_dict() | {"vocab_size": plan.source.vocab_rows or plan.facts.vocab}
    with reserved(job.out):
        require_space(job.out.parent, int(plan.facts.parameters * _BYTES[kind]), purpose=f"writing {job.out.name}")
        report = write_gguf(
            job.out,
            tensors,
            config=config,
            tokenizer=Path(plan.source.tokenizer) if plan.source.tokenizer else None,
            name=plan.spec.model,
            kind=kind,
        )
        try:
            furthest = check_gguf(job.out, tensors, config=config, kind=kind)
        except ModelError:
            job.out.unlink()
            raise
    kinds = ", ".join(f"{count} {name}" for name, count in report.tensors.items())
    print(f"{job.out}: {format_bytes(report.bytes)}, tensors {kinds}")
    print(f"read back: no weight is further than {furthest:.1e} of its tensor's largest from the merged model")
    for note in report.notes:
        print(f"note  {note}")


def _why_not_q4_1(plan: Plan, adapters: Adapters) -> str:
    """Why the merged weights are no scale x integer + minimum in blocks of 32; empty where they are."""
    gptq = plan.source.gptq
    if gptq is None:
        return f"{plan.spec.method} has no integer weights; Q4_1 would round them once more"
    widths = {gptq.shape.bits, *(e.shape.bits if e.shape else 16 for e in gptq.overrides)}
    sizes = {gptq.shape.group_size, *(e.shape.group_size for e in gptq.overrides if e.shape)}
    if max(widths) > 4:
        return f"its weights have up to {max(widths)} bits"
    if any(size % 32 for size in sizes):
        return f"its groups are of {', '.join(map(str, sorted(sizes)))} inputs, and blocks of 32 must lie in one each"
    if adapters.pool == 1:
        return "its adapter is plain LoRA, which changes each weight by itself; --method qa-lora changes groups"
    return ""


def _tensors(backbone: Backbone, adapters: Adapters, kind: Kind) -> Iterable[tuple[str, tuple[tuple[int, ...], Make]]]:
    """Every weight of the merged model, made when its turn comes."""
    merged = Merged(backbone, adapters, torch.float32)
    for weight in backbone.weights():
        module = backbone.model.get_submodule(weight.name.rpartition(".")[0])
        affine = kind == "q4_1" and isinstance(module, PackedGptq) and weight.name.endswith(".weight")
        make: Callable[[], Any] = partial(_affine if affine else _plain, merged, weight.name)
        yield weight.name, (weight.shape, make)


def _plain(merged: Merged, name: str) -> torch.Tensor:
    return merged.read(name).cpu()


def _affine(merged: Merged, name: str) -> Affine:
    """scale x (value - zero) + what the adapter adds to the group."""
    path = name.removesuffix(".weight")
    linear, update = merged.backbone.linear(path), merged.adapters.of(path)
    shape = linear.shape
    scales = linear.scales.detach().float()
    minimums = -scales * unpack_zeros(linear.qzeros.detach(), shape.bits, linear.offset).float()
    if linear.shift is not None:
        before = linear.weight_offset.detach().float() * linear.shift.scale
        minimums += before.repeat_interleave(linear.shift.group_size // shape.group_size, dim=0)
    if update is not None:
        minimums += update.pooled(shape.group_size).to(minimums.device)
    values = unpack(linear.weight.detach(), shape.bits).t()
    return Affine(values.cpu(), scales.cpu(), minimums.cpu(), shape.group_size)
