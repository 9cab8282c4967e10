"""Merges runs, exactly or into 16 bits, and says what it costs."""

from pathlib import Path
from typing import NamedTuple

from qdist.core.requests import Folding, Merge, Onto
from qdist.core.text import counted
from qdist.host.terminal import say
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.evaluation import Evaluation, Loss, losses_of
from qdist.runtime.exports.merged_16bit import Merged
from qdist.runtime.exports.qalora_merge import merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.model.skeleton import DTYPES
from qdist.runtime.quantize.source import find_originals


class Losses(NamedTuple):
    """Held-out losses, each of them a number or why there is none."""

    adapter: Loss
    dequantized: Loss
    original: Loss | None
    """None where there is no original to merge onto."""


def merge(request: Folding) -> Losses:
    """Write the merged model, then evaluate what merging onto either backbone costs.

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
    """Three lines, or one where nothing was evaluated."""
    rows = {
        "adapter": losses.adapter,
        "merged onto dequantized": losses.dequantized,
        "merged onto original": losses.original,
    }
    return losses_of({name: loss for name, loss in rows.items() if loss is not None})


def merge_exactly(request: Folding) -> str:
    """Write QA-LoRA's checkpoint with offsets; what differs from the adapter, in weights and in losses."""
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
    """Merge as the method allows, and say what it costs."""
    say(merge_exactly(request) if Adapters.named_in(request).pool > 1 else report(merge(request)))
