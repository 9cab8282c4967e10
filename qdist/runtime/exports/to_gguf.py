"""A run's merged model as a GGUF file: QA-LoRA's integers as they are, in Q4_1; any method rounded to F16 or Q8_0."""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from qdist.core.errors import RunError
from qdist.core.plan import Plan
from qdist.core.units import format_bytes
from qdist.host.disk import require_space
from qdist.host.files import sync
from qdist.host.terminal import say
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.gguf import file_bytes, write_gguf
from qdist.runtime.exports.gguf_blocks import Affine, Kind, Make
from qdist.runtime.exports.gguf_check import check_gguf
from qdist.runtime.exports.job import Export
from qdist.runtime.exports.merged import Merged
from qdist.runtime.exports.update import Adapters
from qdist.runtime.gptq.bits import unpack, unpack_zeros
from qdist.runtime.methods.packed_gptq import PackedGptq
from qdist.runtime.work_folder import reserved


def run(job: Export) -> None:
    """Write the file, read it back, and say how far it is from the merged model. Killed, it is begun anew."""
    adapters = job.adapters
    plan = adapters.plan
    reason = _why_not_q4_1(plan, adapters)
    kind = job.type or ("f16" if reason else "q4_1")
    if kind == "q4_1" and reason:
        raise RunError(f"{adapters.runs[0].path} cannot be Q4_1: {reason}", try_="--type q8_0, or f16")
    model = _Model(Backbone(plan, onto=job.onto), adapters, kind)
    tensors = dict(model.tensors())
    config = model.backbone.model.config.to_dict() | {"vocab_size": plan.source.vocab_rows or plan.facts.vocab}
    tokenizer = Path(plan.source.tokenizer) if plan.source.tokenizer else None
    unchecked = job.out.with_name(f".{job.out.stem}.unchecked.gguf")
    with reserved(job.out):
        needed = file_bytes(tensors, config=config, name=plan.spec.model, kind=kind)
        require_space(job.out.parent, needed, purpose=f"writing {job.out.name}")
        try:
            report = write_gguf(
                unchecked, tensors, config=config, tokenizer=tokenizer, name=plan.spec.model, kind=kind, ends=plan.ends
            )
            furthest = check_gguf(unchecked, tensors, config=config, kind=kind)
            os.replace(unchecked, job.out)
        finally:
            unchecked.unlink(missing_ok=True)
        sync(job.out.parent)
    kinds = ", ".join(f"{count} {name}" for name, count in report.tensors.items())
    say(f"{job.out}: {format_bytes(report.bytes)}, tensors {kinds}")
    say(f"read back: no weight is further than {furthest:.1e} of its tensor's largest from the merged model")
    if model.lost:
        say(f"minimums in float16 take {model.lost:.1%} of the adapter")
    for note in (*([f"not Q4_1: {reason}"] if reason and not job.type else []), *report.notes):
        say(f"note  {note}")


def _why_not_q4_1(plan: Plan, adapters: Adapters) -> str:
    """Why the merged weights are no scale x integer + minimum in blocks of 32; empty where they are."""
    gptq = plan.source.gptq
    if gptq is None:
        return f"{plan.spec.method} has no integer weights; Q4_1 would round them once more"
    widths = {gptq.shape.bits, *(e.shape.bits if e.shape else 16 for e in gptq.overrides)}
    sizes = gptq.group_sizes
    if max(widths) > 4:
        return f"its weights have up to {max(widths)} bits"
    if any(size % 32 for size in sizes):
        return f"its groups are of {', '.join(map(str, sorted(sizes)))} inputs, and blocks of 32 must lie in one each"
    if adapters.pool == 1:
        return "its adapter is plain LoRA, which changes each weight by itself; --method qa-lora changes groups"
    return ""


class _Model:
    """The merged model's tensors, made when their turn comes."""

    def __init__(self, backbone: Backbone, adapters: Adapters, kind: Kind) -> None:
        self.backbone, self._adapters, self._kind = backbone, adapters, kind
        self._merged = Merged(backbone, adapters, torch.float32)
        self._rounded: dict[str, tuple[float, float]] = {}

    @property
    def lost(self) -> float:
        """What float16 minimums take of the update, norm by norm, over the linears that were made."""
        missing, total = (sum(sums) for sums in zip(*self._rounded.values(), strict=True)) if self._rounded else (0, 0)
        return math.sqrt(missing / total) if total else 0.0

    def tensors(self) -> Iterator[tuple[str, tuple[tuple[int, ...], Make]]]:
        """Every weight, under transformers' names."""
        for weight in self.backbone.weights():
            module = self.backbone.model.get_submodule(weight.name.rpartition(".")[0])
            affine = self._kind == "q4_1" and isinstance(module, PackedGptq) and weight.name.endswith(".weight")
            yield weight.name, (weight.shape, partial(self._affine if affine else self._plain, weight.name))

    def _plain(self, name: str) -> torch.Tensor:
        return self._merged.read(name).cpu()

    def _affine(self, name: str) -> Affine:
        """scale x (value - zero) + what the adapter adds to the group."""
        path = name.removesuffix(".weight")
        linear, update = self.backbone.linear(path), self._adapters.of(path)
        shape = linear.shape
        scales = linear.scales.detach().float()
        minimums = -scales * unpack_zeros(linear.qzeros.detach(), shape.bits, linear.offset).float()
        if linear.shift is not None:
            before = linear.weight_offset.detach().float() * linear.shift.scale
            minimums += before.repeat_interleave(linear.shift.group_size // shape.group_size, dim=0)
        if update is not None:
            added = update.pooled(shape.group_size).to(minimums.device)
            minimums += added
            off = (minimums.half().float() - minimums).double()
            self._rounded[path] = float(off.square().sum()), float(added.double().square().sum())
        values = unpack(linear.weight.detach(), shape.bits).t()
        return Affine(values.cpu(), scales.cpu(), minimums.cpu(), shape.group_size)
