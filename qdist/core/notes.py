"""What was decided for the user, and why, in words."""

from collections.abc import Iterator

from qdist.core.candidates import Candidate, Setting
from qdist.core.cards import has_bfloat16
from qdist.core.cluster import Cluster
from qdist.core.errors import SpecError
from qdist.core.lessons import Correction
from qdist.core.spec import Optim
from qdist.core.units import format_bytes

_WORTH_SAYING = 0.1
"""Share of the time that a pipeline waits beyond which a larger batch is worth a note."""


def notes(setting: Setting, winner: Candidate, barred: SpecError | None) -> Iterator[str]:
    """One sentence for each decision that one would not guess.

    barred: why a faster layout was passed over, if one was.
    """
    spec, layers = setting.spec, setting.sizes.facts.layers
    if winner.layout.schedule == "sequential" and spec.split.schedule is None and barred:
        yield f"sequential: {barred.message}"
    if winner.offloaded:
        why = ", since nothing else fits" if spec.split.offload_layers is None else ""
        held = format_bytes(len(winner.offloaded) * setting.sizes.layer)
        yield (
            f"{len(winner.offloaded)} of {layers} layers wait in host memory{why}: {held} of it; "
            "each pass copies them to the GPU"
        )
    if winner.checkpointed and spec.train.checkpointing is None:
        which = "every layer" if winner.checkpointed == layers else f"{winner.checkpointed} of {layers} layers"
        yield f"what {which} would keep for the backward pass does not fit, and is computed anew"
    if winner.layout.schedule == "1f1b":
        stages = winner.layout.gpus_per_group
        idle = (stages - 1) / (winner.micro_batches + stages - 1)
        if idle > _WORTH_SAYING:
            unit = "GPU" if setting.rooms is not None else "rank"
            yield (
                f"with {winner.micro_batches} micro-batches in {stages} stages each {unit} waits {100 * idle:.0f} % of "
                "the time; a larger global_batch waits less"
            )
    if winner.layout.zero_stage == 3:
        yield (
            "zero.stage=3 gathers adapters that stay whole on every rank: 7B on 2 H200s ran at 18,517 tokens/s under "
            "it, at 21,976 under zero.stage=2"
        )


def dtype_notes(dtype: str, cluster: Cluster) -> Iterator[str]:
    """What a card makes of an arithmetic that it was not built for."""
    slow = next((gpu.name for gpu in cluster.gpus if not has_bfloat16(gpu.name)), None)
    if dtype == "bfloat16" and slow:
        yield f"a {slow} emulates bfloat16, which is slow: --set dtype=float16 uses its matrix units"


def warmup_notes(optim: Optim, steps: int) -> Iterator[str]:
    """Where a run ends before its learning rate has risen."""
    if steps < optim.warmup_steps:
        reached = f"{optim.lr * steps / optim.warmup_steps:.1e} of {optim.lr:.1e}"
        yield f"optim.warmup_steps={optim.warmup_steps} of {steps} steps: the rate ends at {reached}"


def correction_notes(correction: Correction | None) -> Iterator[str]:
    """What earlier runs changed in the prediction."""
    if correction is None:
        return
    what = [
        "speed" if correction.speeds else "",
        "context" if correction.context_bytes is not None else "",
    ]
    by = "by earlier runs" if not correction.runs else f"by {correction.runs} earlier run"
    by += "s" if correction.runs > 1 else ""
    yield f"{' and '.join(filter(None, what)) or 'speed'} corrected {by} on this kind of card"
