"""How many bytes of disk does a run take: its model made ready, its checkpoints, its adapter?"""

from math import ceil
from typing import NamedTuple

from qdist.core.model.adapters.registry import trained_matrices
from qdist.core.model.shapes import ALL_LINEAR, ModelFacts
from qdist.core.model.storage import Packing
from qdist.core.planning.memory import TrainingShape, eight_bit_moments, sizes
from qdist.core.planning.plan import Plan


class Storage(NamedTuple):
    """Bytes that a run leaves in its directory."""

    adapter: int
    checkpoint: int
    most_checkpoints: int
    """Most checkpoints at a time: those kept, the best, and the one being written."""

    @property
    def total(self) -> int:
        """Bytes at the peak; logs and events are negligible."""
        return self.adapter + self.most_checkpoints * self.checkpoint


def storage(plan: Plan) -> Storage:
    """Bytes that a run will leave on the disk of its directory."""
    train, lora, facts = plan.spec.train, plan.spec.lora, plan.facts
    tables = 1 if facts.tied_embeddings else 2
    # Before a model is prepared nobody knows which of the tokens it has: they all count as new.
    rows = len(plan.source.new_token_ids) or (len(plan.spec.new_tokens) if plan.source.kind == "dummy" else 0)
    adapter = 4 * (plan.adapter_parameters + rows * facts.hidden * tables)
    moments = 2 * adapter
    if plan.optimizer == "adamw-8bit":
        own = (
            run.count * sum(map(eight_bit_moments, trained_matrices(run.shape, lora.r, lora.targets, plan.adapter)))
            for run in facts.layers
        )
        moments = sum(own) + tables * eight_bit_moments(rows * facts.hidden)
    written = ceil(plan.steps / train.save_steps) + (plan.steps // train.eval_steps if train.eval_steps else 0)
    kept = train.keep + (train.eval_steps > 0) + 1
    return Storage(adapter, adapter + moments, min(kept, written))


def packed_bytes(facts: ModelFacts, packing: Packing, *, stored_bytes: int = 2) -> int:
    """A model's weights, packed. stored_bytes: of a number of what is not packed."""
    job = TrainingShape(
        bits=packing.linear_bits,
        mxfp4=packing.type == "mxfp4",
        double_quant=packing.double,
        compute_bytes=stored_bytes,
        rank_r=1,
        targets=(ALL_LINEAR,),
        seq_len=1,
    )
    parts = sizes(facts, job)
    return parts.packed(run.count for run in facts.layers) + parts.embedding + parts.head
