"""A run's merged model as a GGUF file, read back and compared tensor by tensor."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch

from qdist.core.errors import MachineError, ModelError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.requests import Export
from qdist.core.text import format_bytes
from qdist.host.files import require_space, sync
from qdist.host.opening import told
from qdist.host.progress import ProgressLine
from qdist.host.sources.gguf_header import read_header
from qdist.host.sources.models import locate
from qdist.host.terminal import say
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.gguf.blocks import Affine, Kind, Make, Stored, Type, dense, made, rows_of
from qdist.runtime.exports.gguf.file import file_bytes, write_gguf
from qdist.runtime.exports.gguf.metadata import rope_of
from qdist.runtime.exports.gguf.ollama import worded_tokenizer, write_modelfile
from qdist.runtime.exports.gguf.quantizer import MIXTURES, ROUNDED_BY_LLAMA_CPP, quantizer
from qdist.runtime.exports.gguf.tensors import facts_of, stored_tensors
from qdist.runtime.exports.gguf.tokenizer import templates_of
from qdist.runtime.exports.merged_16bit import Merged
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.work_folder import reserved
from qdist.runtime.kernels.gptq_bits import unpack, unpack_zeros
from qdist.runtime.model.packed_gptq import PackedGptq

_U, _T, _FLOAT = 2.0**-11, 2.0**-25, 2.0**-24
_ARITHMETIC = 1e-6
"""Relative error of float32 itself, to M or a bound, when weights are computed for the comparison."""
_BITS = {kind: int(next(filter(str.isdecimal, kind.name))) for kind in ROUNDED_BY_LLAMA_CPP}
"""Of a weight. llama.cpp rounds for the least sum of squares, not for the least largest error, which is up to a quarter
of the bound for weights of a normal distribution."""


def check_gguf(
    out: Path, tensors: Mapping[str, tuple[tuple[int, ...], Make]], *, config: Mapping[str, Any], kind: Kind
) -> float:
    """The largest error of any weight, relative to the largest magnitude in its tensor.

    Arguments as `write_gguf` was given them. The file is mapped, and each tensor is made once more.
    Raises ModelError if a tensor is missing, of another shape or type, or further off than its type rounds to.
    """
    facts, rope = facts_of(config, name=out.name), rope_of(config, name=out.name)
    stored = stored_tensors(tensors, facts, rope, kind)
    with told(f"{out} is not a whole GGUF file", ModelError, try_="export it again"):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    odd = sorted(found.keys() ^ {tensor.name for tensor in stored})
    if odd:
        raise ModelError(f"{out} and the model differ in {odd[0]}", try_="export it again")
    furthest = 0.0
    with ProgressLine(sum(tensor.bytes for tensor in stored), "checked", in_bytes=True) as progress:
        for tensor in stored:
            furthest = max(furthest, _error(tensor, found[tensor.name], out))
            progress.advance(tensor.bytes)
    return furthest


def _error(tensor: Stored, found: Any, out: Path) -> float:
    """The largest error of a tensor, relative to its largest magnitude."""
    if found.tensor_type != tensor.type or tuple(reversed(found.shape.tolist())) != tensor.shape:
        shape = list(reversed(found.shape.tolist()))
        raise ModelError(
            f"{out} has {tensor.name} as {found.tensor_type.name} {shape}, not {tensor.type.name} {list(tensor.shape)}",
            try_="export it again",
        )
    value = made(tensor)
    furthest = largest = 0.0
    for rows in rows_of(tensor, value):
        read = torch.from_numpy(gguf.quants.dequantize(found.data[rows.start : rows.stop], found.tensor_type).copy())
        asked = dense(rows.part) if isinstance(rows.part, Affine) else rows.part.to(torch.float32)
        largest = max(largest, float(asked.abs().max()))
        difference = float((read - asked).abs().max())
        if difference != difference:
            raise ModelError(f"{out} has numbers in {tensor.name} that are not finite", try_="export it again")
        furthest = max(furthest, difference)
    _require_within(tensor, furthest, _bound(tensor, value, largest), largest, out)
    return furthest / largest if largest else 0.0


def _require_within(tensor: Stored, furthest: float, bound: float, largest: float, out: Path) -> None:
    allowed = bound * (1 + 1e-5) + _ARITHMETIC * largest
    if furthest > allowed:
        raise ModelError(
            f"{out} has {tensor.source} off by {furthest:.3g}, and {tensor.type.name} rounds by {allowed:.3g} at most",
            try_="export it again",
        )


def _bound(tensor: Stored, value: torch.Tensor | Affine, largest: float) -> float:
    """Error bound of any weight; see the module docstring."""
    if tensor.type == Type.F32:
        return _FLOAT * largest
    if tensor.type == Type.F16:
        return _U * largest + _T
    if tensor.type == Type.Q8_0:
        return largest / 254 + _U * largest + 127 * _T
    if tensor.type in ROUNDED_BY_LLAMA_CPP:
        return 4 * largest / 2 ** _BITS[tensor.type]
    assert isinstance(value, Affine)
    return 15 * _rounding(value.scales) + _rounding(value.minimums)


def _rounding(numbers: torch.Tensor) -> float:
    """Largest change from rounding the numbers to fp16."""
    return float((numbers.to(torch.float16).to(torch.float32) - numbers.to(torch.float32)).abs().max())


def run(request: Export) -> None:
    """Write the file, read it back, and report its distance from the merged model. A killed export starts over."""
    adapters, out = Adapters.named_in(request), Path(request.out)
    plan = adapters.plan
    reason = _why_not_q4_1(plan, adapters)
    kind = request.type or ("f16" if reason else "q4_1")
    if kind == "q4_1" and reason:
        raise RunError(f"{adapters.runs[0].path} cannot be Q4_1: {reason}", try_="--type q8_0, or f16")
    if kind in MIXTURES:
        quantizer()  # raises, before anything is read, where it is not there
    model = _Model(Backbone(plan, onto=request.backbone), adapters, kind)
    tensors = dict(model.tensors())
    config = model.backbone.model.config.to_dict() | {"vocab_size": plan.source.vocab_rows or plan.facts.vocab}
    tokenizer, worded = Path(plan.source.tokenizer) if plan.source.tokenizer else None, worded_tokenizer(plan)
    unchecked = out.with_name(f".{out.stem}.unchecked.gguf")
    with reserved(out):
        needed = file_bytes(tensors, config=config, name=plan.spec.model, kind=kind)
        require_space(out.parent, needed, purpose=f"writing {out.name}")
        try:
            report = write_gguf(
                unchecked, tensors, config=config, tokenizer=tokenizer, name=_named(plan), kind=kind, ends=plan.ends,
                chat_template=templates_of(worded),
            )  # fmt: skip
            furthest = check_gguf(unchecked, tensors, config=config, kind=kind)
            os.replace(unchecked, out)
        finally:
            unchecked.unlink(missing_ok=True)
        sync(out.parent)
    if request.cached:
        return
    kinds = ", ".join(f"{count} {name}" for name, count in report.tensors.items())
    say(f"{out}: {format_bytes(report.bytes)}, tensors {kinds}")
    say(str(model.folded))
    say(f"read back: no weight is further than {furthest:.1e} of its tensor's largest from the merged model")
    if model.lost:
        say(f"minimums in float16 take {model.lost:.1%} of the adapter")
    for note in (*([f"not Q4_1: {reason}"] if reason and not request.type else []), *report.notes):
        say(f"note  {note}")
    if worded is not None:
        say(write_modelfile(out, plan, worded))


def _named(plan: Plan) -> str:
    """general.name: as a GGUF base has it, or else as the user calls the base."""
    try:
        located = locate(plan.spec.model)
    except (ModelError, MachineError):  # gone since
        return plan.spec.model
    said = read_header(Path(located.path)).metadata if located.kind == "gguf" else {}
    return str(said.get("general.name") or plan.spec.model)


def _why_not_q4_1(plan: Plan, adapters: Adapters) -> str:
    """Why the merged weights are not scale x integer + minimum in blocks of 32; empty if they are."""
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
    """The merged model's tensors, created on demand."""

    def __init__(self, backbone: Backbone, adapters: Adapters, kind: Kind) -> None:
        self.backbone, self._adapters, self._kind = backbone, adapters, kind
        self._merged = Merged(backbone, adapters, torch.float32)
        self.folded = self._merged.folded
        self._rounded: dict[str, tuple[float, float]] = {}

    @property
    def lost(self) -> float:
        """What float16 minimums lose of the update, as a ratio of norms, over the linears made so far."""
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
        """scale x (value - zero) + the adapter's update of the group."""
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
