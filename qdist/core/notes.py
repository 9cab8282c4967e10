"""What was decided for the user, and why, in words."""

from collections.abc import Iterator

from qdist.core.candidates import Candidate
from qdist.core.spec import RunSpec

_WORTH_SAYING = 0.1
"""Share of the time that a pipeline waits beyond which a larger batch is worth a note."""


def notes(spec: RunSpec, winner: Candidate, *, layers: int) -> Iterator[str]:
    """One sentence for each decision that one would not guess."""
    if winner.offloaded:
        why = ", since nothing else fits" if spec.split.offload_layers is None else ""
        yield f"{len(winner.offloaded)} of {layers} layers wait in host memory{why}: each pass copies them to the GPU"
    if winner.checkpointed and spec.train.checkpointing is None:
        which = "every layer" if winner.checkpointed == layers else f"{winner.checkpointed} of {layers} layers"
        yield f"what {which} would keep for the backward pass does not fit, and is computed anew"
    if winner.layout.schedule == "1f1b":
        stages = winner.layout.gpus_per_group
        idle = (stages - 1) / (winner.micro_batches + stages - 1)
        if idle > _WORTH_SAYING:
            yield (
                f"with {winner.micro_batches} micro-batches in {stages} stages each GPU waits {100 * idle:.0f} % of "
                "the time; a larger global_batch waits less"
            )
