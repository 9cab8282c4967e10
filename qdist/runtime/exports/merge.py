"""Merges runs, exactly or into 16 bits, and evaluates the cost: held-out losses before and after."""

import gc
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import PlanError
from qdist.core.planning.inference import Footprint, Residence, footprint
from qdist.core.planning.plan import Plan, Source
from qdist.core.requests import Folding, Merge, Onto
from qdist.core.text import counted, format_bytes
from qdist.host.hub.card import write_merged_card
from qdist.host.machine import probe
from qdist.host.progress import ProgressLine
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say
from qdist.runtime.data.batches import Samples, read_samples
from qdist.runtime.engine.objective import Forward
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.merged_16bit import Merged
from qdist.runtime.exports.qalora_merge import merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.load import footprint_of, load_run, load_tokenizer, plan_of, residence_of
from qdist.runtime.infer.plain import ROOM_TOKENS, open_plain
from qdist.runtime.infer.residence import arrange, choose, first_device, settle
from qdist.runtime.model.skeleton import DTYPES, fill, skeleton
from qdist.runtime.model.weights import Weights
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.source import find_originals
from qdist.runtime.quantize.tensors import StoredModel


class Loss(NamedTuple):
    """Loss on the held-out samples, or why there is none."""

    value: float | None
    note: str = ""

    def __str__(self) -> str:
        return f"not evaluated: {self.note}" if self.value is None else f"{self.value:.4f}"


def losses_of(rows: Mapping[str, Loss]) -> str:
    """One line per model, or a single one if none was evaluated, all for the same reason."""
    if len(set(rows.values())) == 1 and next(iter(rows.values())).value is None:
        return f"held-out loss  {next(iter(rows.values()))}"
    width = max(map(len, rows)) + 3
    return "held-out loss  " + "\n               ".join(f"{name:{width}}{loss}" for name, loss in rows.items())


class Evaluation:
    """Evaluates models on a run's held-out samples, on the GPUs, or in host memory if there are none.

    A model that has no room is not evaluated, and what it would need is said.
    """

    def __init__(self, run: RunDir) -> None:
        self.run, self.plan = run, plan_of(run)

    @property
    def refusal(self) -> str:
        """Why no model can be evaluated; empty if they can."""
        if self.plan.source.kind == "dummy":
            return "random weights"
        if self.plan.data and not Path(self.plan.data.path).is_file():
            return "the run's tokens are gone from the cache"
        return "" if self._samples.held_out else "the run holds nothing out"

    def adapter(self) -> Loss:
        """Loss of the run's packed backbone with its adapter."""
        return self._loss(self._adapter)

    def written(self, folder: Path, dtype: torch.dtype) -> Loss:
        """Loss of a merged model, read back from its folder."""
        source = Source(kind="folder", path=str(folder), packed=str(folder), config={}, tokenizer="")
        weights = StoredModel(folder, blueprint(folder, self.plan.facts))
        return self._loss(partial(self._plain, source, weights, dtype))

    def quantized(self, folder: Path) -> Loss:
        """Loss of a GPTQ checkpoint, merged or not, read back from its folder."""
        return self._loss(partial(self._checkpoint, folder))

    def unwritten(self, merged: Merged) -> Loss:
        """Loss of a merged model that was not written: each weight is computed on its way into memory."""
        return self._loss(partial(self._plain, self.plan.source, merged, merged.dtype))

    @cached_property
    def _samples(self) -> Samples:
        tokenizer = load_tokenizer(self.plan.source)
        return read_samples(self.plan, pad_id=tokenizer.pad_token_id if tokenizer else 0)

    def _loss(self, evaluate: Callable[[], float]) -> Loss:
        if refusal := self.refusal:
            return Loss(None, refusal)
        try:
            return Loss(evaluate())
        except PlanError as error:
            return Loss(None, error.message)
        except torch.OutOfMemoryError as error:  # what is written stays written
            return Loss(None, str(error).partition(". GPU ")[0])
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without a GPU

    def _adapter(self) -> float:
        plan = self.plan
        dtype, tokens = DTYPES[plan.compute_dtype], plan.micro_batch * plan.seq_len
        residence = residence_of(plan, dtype, tokens=tokens, scored=tokens)
        if not residence.gpus:
            _require_host_memory(footprint_of(plan, dtype, tokens=tokens, scored=tokens))
        model, _ = load_run(self.run, dtype, residence)
        return self.held_out(model, dtype)

    def _checkpoint(self, folder: Path) -> float:
        opened = open_plain(str(folder), self.plan.compute_dtype, None, None, tokens=ROOM_TOKENS)
        return self.held_out(opened.model, DTYPES[self.plan.compute_dtype])

    def _plain(self, source: Source, weights: Weights, dtype: torch.dtype) -> float:
        used = dtype if torch.cuda.is_available() else torch.float32  # most CPUs emulate 16-bit arithmetic
        residence = _residence(self.plan, used)
        model = skeleton(source, bits=16, quant=self.plan.spec.quant, dtype=used, facts=self.plan.facts)
        arrange(model, residence)
        fill(model, weights, device=first_device(residence))
        settle(model, residence)
        return self.held_out(model, used)

    def held_out(self, model: Any, dtype: torch.dtype) -> float:
        """A model's loss over the run's held-out samples."""
        samples, batches = self._samples, self._samples.held_out_batches()
        with ProgressLine(len(batches), "held-out micro-batches evaluated") as progress:
            began = partial(_began, progress)
            loss, tokens = Forward(model, samples, dtype=dtype, fused=False).evaluate(batches, began)
            progress.advance(1)
        return loss / tokens


def _began(progress: ProgressLine, count: int) -> None:
    """Report progress when a micro-batch begins, because the previous one is then done."""
    if count > 1:
        progress.advance(1)


def _residence(plan: Plan, dtype: torch.dtype) -> Residence:
    """Where to place the merged model. Raises PlanError if it does not fit."""
    tokens = plan.micro_batch * plan.seq_len
    parts = footprint(
        plan.facts, bits=16, double_quant=False, compute_bytes=dtype.itemsize, tokens=tokens, scored=tokens
    )
    residence = choose(parts, device=None, max_memory_bytes=None)
    if not residence.gpus:
        _require_host_memory(parts)
    return residence


def _require_host_memory(parts: Footprint) -> None:
    needed = parts.model
    free = probe.host_memory(Path("/"))[1]
    if needed > free:
        raise PlanError(f"it takes {format_bytes(needed)} of host memory, {format_bytes(free)} is free")


class Losses(NamedTuple):
    """Held-out losses, each a number or why there is none."""

    adapter: Loss
    dequantized: Loss
    original: Loss | None
    """None if there is no original to merge onto."""


def merge(request: Folding) -> Losses:
    """Write the merged model, then evaluate the cost of merging onto either backbone.

    Raises what `sixteen.write` raises; nothing is at its `out` then.
    """
    merged_16bit.run(request)
    adapters, dtype = Adapters.named_in(request), DTYPES[request.stored]
    if not adapters.alone:
        several = "several runs, each with held-out samples of its own"
        none = Loss(None, several if len(adapters.runs) > 1 else "with a weight it is not the adapter of the run")
        return Losses(none, none, None)
    evaluation = Evaluation(adapters.runs[0])
    plan = evaluation.plan

    def loss_of(onto: Onto) -> Loss:
        if evaluation.refusal:
            return Loss(None, evaluation.refusal)
        if onto == request.backbone:
            return evaluation.written(Path(request.out), dtype)
        return evaluation.unwritten(Merged(Backbone(plan, onto=onto), adapters, dtype))

    no_original = isinstance(find_originals(plan.source), str)
    return Losses(evaluation.adapter(), loss_of("dequantized"), None if no_original else loss_of("original"))


def report(losses: Losses) -> str:
    """The report: three lines, or one if nothing was evaluated."""
    rows = {
        "adapter": losses.adapter,
        "merged onto dequantized": losses.dequantized,
        "merged onto original": losses.original,
    }
    return losses_of({name: loss for name, loss in rows.items() if loss is not None})


def merge_exactly(request: Folding) -> str:
    """Write QA-LoRA's checkpoint with offsets; reports how it differs from the adapter in weights and losses."""
    adapters, out = Adapters.named_in(request), Path(request.out)
    difference = merge_offsets(adapters, out)
    relative, largest = difference.relative, difference.largest
    kept = f"; all {difference.unchanged} tensors of the base as they were" if difference.unchanged else ""
    lines = [
        f"{out}: {counted(len(request.runs), 'adapter')} merged{kept}",
        f"weights differ from those under the adapter by {relative:.2e} of its update, at most by {largest:.1e}",
    ]
    if adapters.alone:
        evaluation = Evaluation(adapters.runs[0])
        lines.append(losses_of({"adapter": evaluation.adapter(), "merged": evaluation.quantized(out)}))
    return "\n".join(lines)


def run(request: Merge) -> None:
    """Merge as the method allows, and report the cost."""
    is_exact = Adapters.named_in(request).pool > 1
    text = merge_exactly(request) if is_exact else report(merge(request))
    how = (
        "exactly, as offsets of its groups" if is_exact else f"onto the {request.backbone} weights, in {request.stored}"
    )
    write_merged_card(Path(request.out), [RunDir(run) for run in request.runs], f"It was merged {how}.")
    say(text)
