"""What does a CPU rank hold beside its tensors, and does its plan say so rank by rank?"""

from typing import Any

import msgspec
import pytest

from qdist.core.model.gptq import Gptq, Shape
from qdist.core.planning.memory import MemoryBudget, TrainingShape
from qdist.core.planning.placements.replicate import Replicated
from qdist.core.planning.placements.split import Pipeline
from qdist.core.planning.plan import DataFacts, Fullest, Plan
from qdist.core.planning.process_memory import (
    HOLES,
    HOLES_16_BIT,
    HOLES_GPTQ,
    HOLES_STAGES,
    LIBRARIES_BYTES,
    OWN_PAGES_BYTES,
    hole_bytes,
    library_bytes,
    resident_set,
)
from qdist.core.text import MIB
from tests.plans import CPU, gpus, planned

GPTQ = Gptq(shape=Shape(4, 32))
LAYOUT = Replicated(groups=1, gpus_per_group=1)
FULLEST = (
    Fullest(samples=4, positions=(4 * 40,), learned=(50,)),
    Fullest(samples=4, positions=(4 * 40, 4 * 24), learned=(50, 30)),
)
DATA = DataFacts(
    path="cache", samples=100, train_samples=90, held_out_samples=10, tokens=4000, longest=120, fullest=FULLEST
)
TWO = {"gpus": 2, "global_batch": 8, "micro_batch": 4}


def cpu_plan(**settings: Any) -> Plan:
    return planned("smollm2-135m", CPU, TWO | settings, data=DATA)


def budget(**mebibytes: int) -> MemoryBudget:
    zeros = dict.fromkeys(MemoryBudget.__struct_fields__, 0)
    return MemoryBudget(**{**zeros, **{name: count * MIB for name, count in mebibytes.items()}})


def test_deepspeed_is_imported_where_it_is_the_engine() -> None:
    other = msgspec.structs.replace(LAYOUT, engine="deepspeed", zero_stage=2, groups=2)
    assert LIBRARIES_BYTES == library_bytes(LAYOUT) < library_bytes(other)


@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, HOLES), ({"bits": 8}, HOLES), ({"bits": 16}, HOLES_16_BIT), ({"gptq": GPTQ}, HOLES_GPTQ)],
)
def test_the_heap_has_holes_that_unpacking_fills(settings: dict[str, Any], share: float) -> None:
    job = TrainingShape(
        **{"bits": 4, "compute_bytes": 4, "rank_r": 8, "targets": ("all-linear",), "seq_len": 64} | settings
    )
    assert hole_bytes(job, LAYOUT, 500 * MIB) == round(share * 500 * MIB)
    stages = Pipeline(groups=1, gpus_per_group=2)
    assert hole_bytes(job, stages, 500 * MIB) == round(HOLES_STAGES * 500 * MIB)


def test_tensors_with_pages_of_their_own_leave_no_holes() -> None:
    settings = {"gpus": 1, "micro_batch": 2, "global_batch": 2, "seq_len": 2048, "train.checkpointing": True}
    assert OWN_PAGES_BYTES == 2 * 2048 * 2048 * 4
    (rank,) = planned("pythia-1.4b", CPU, settings).ranks
    assert rank.expected[0].context == LIBRARIES_BYTES


@pytest.mark.parametrize(("alone", "more"), [(True, 120 - 60), (False, 120 - 40)])
def test_a_checkpoint_in_memory_may_take_more_than_a_step(alone: bool, more: int) -> None:
    """Parameters and both moments, 12 bytes; gradients that ranks add up stay beside them."""
    own = budget(weights=100, adapter=40, gradients=20, activations=30, logits=10, context=490)
    saved = resident_set(own, holes=0, copied=10 * MIB, alone=alone)
    assert saved.total - own.total == more * MIB
    assert resident_set(own, holes=0, copied=MIB, alone=alone) == own


def test_each_rank_is_planned_with_the_micro_batches_that_it_will_see() -> None:
    first, second = (rank.expected[0] for rank in cpu_plan().ranks)
    assert first.activations > second.activations
    assert first.weights == second.weights
    ranks = (Fullest(samples=4, positions=(4 * 40, 4 * 40), learned=(50, 50)),)
    alike = planned("smollm2-135m", CPU, TWO, data=msgspec.structs.replace(DATA, fullest=ranks))
    assert {rank.expected[0] for rank in alike.ranks} == {first}


def test_stages_see_the_same_micro_batches_padded_to_the_width_of_their_buffers() -> None:
    split = cpu_plan(placement="split")
    wide = planned(
        "smollm2-135m", CPU, TWO | {"placement": "split"},
        data=msgspec.structs.replace(DATA, fullest=(Fullest(samples=4, positions=(4 * 64,), learned=(50,)),)),
    )  # fmt: skip
    assert [rank.expected for rank in split.ranks] == [rank.expected for rank in wide.ranks]


def test_what_was_counted_changes_nothing_on_gpus() -> None:
    bare = msgspec.structs.replace(DATA, fullest=())
    for settings in ({}, {"placement": "split"}):
        one, other = (planned("smollm2-135m", gpus(2, 24), TWO | settings, data=data) for data in (DATA, bare))
        assert one.ranks == other.ranks
