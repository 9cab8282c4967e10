"""Does the planner find the global batch that makes the network cheap, take it only if asked, and say so?"""

from typing import Any

import pytest

from qdist.core.machine.cluster import Network
from qdist.core.planning.batch import first_batch
from qdist.core.planning.plan import DataFacts, Plan
from qdist.core.spec.run_spec import RunSpec, nest, resolve
from tests.core.planning.test_nodes import nodes
from tests.plans import gpus, planned


def share(plan: Plan) -> float:
    """Share of a step that the network takes."""
    return plan.network_seconds * plan.tokens_per_second / plan.step_tokens


def named(plan: Plan) -> int:
    """The global batch that a plan's notes name."""
    (note,) = (note for note in plan.notes if "would bring it under 5 %" in note)
    return int(note.partition("global_batch=")[2].split()[0])


def test_the_batch_that_is_named_brings_the_network_under_5_percent() -> None:
    own: dict[str, Any] = {"micro_batch": 2, "placement": "replicate", "zero.stage": 0}
    little = planned("llama-7b", nodes(2, 2), {**own, "global_batch": 8})
    assert share(little) > 0.05
    batch = named(little)
    assert share(planned("llama-7b", nodes(2, 2), {**own, "global_batch": batch})) <= 0.05
    assert share(planned("llama-7b", nodes(2, 2), {**own, "global_batch": batch - 8})) > 0.05


@pytest.mark.parametrize("counts", [(2, 2), (8, 8, 8, 8), (3, 1)])
def test_auto_takes_a_batch_with_which_the_network_is_cheap(counts: tuple[int, ...]) -> None:
    plan = planned("llama-7b", nodes(*counts), {"global_batch": None})
    assert share(plan) <= 0.05
    assert plan.spec.global_batch == plan.spec.batch
    assert any(note.startswith(f"global_batch={plan.spec.batch}: the network takes") for note in plan.notes)
    again = planned("llama-7b", nodes(*counts), {"global_batch": plan.spec.batch})
    assert again.micro_batch * again.gradient_accumulation * again.data_parallel == plan.spec.batch


def test_only_auto_takes_it() -> None:
    assert planned("llama-7b", nodes(2, 2)).spec.global_batch == 16


def test_auto_is_16_on_one_machine() -> None:
    assert planned("llama-7b", gpus(4, 80), {"global_batch": None}).spec.global_batch == 16


def test_auto_is_rounded_up_to_what_ranks_of_unknown_speed_share() -> None:
    plan = planned("llama-7b", nodes(3, 2, 1, gib=0), {"global_batch": None})
    assert plan.spec.global_batch == 18


def test_auto_is_not_more_than_the_data_have() -> None:
    few = DataFacts(path="", samples=40, train_samples=40, held_out_samples=0, tokens=40 * 512, longest=512)
    plan = planned("llama-7b", nodes(2, 2), {"global_batch": None}, data=few)
    assert plan.spec.batch <= 40


@pytest.mark.parametrize(
    ("settings", "counts", "batch"),
    [
        ({}, (8,), 16), ({}, (8, 8), 16), ({}, (8, 8, 8), 24), ({"micro_batch": 3}, (2, 2), 24),
        ({"gpus_per_group": 4}, (8, 6), 24),
    ],
)  # fmt: skip
def test_the_first_batch_is_shared_evenly(settings: dict[str, Any], counts: tuple[int, ...], batch: int) -> None:
    spec: RunSpec = resolve(nest({"global_batch": None, **settings}))
    assert first_batch(spec, counts) == batch


def test_no_batch_is_named_where_none_helps() -> None:
    slow = Network(bytes_s=1.25e8, latency_s=1e-3, source="given")
    plan = planned("llama-7b", nodes(1, 1, network=slow), {"placement": "shard", "global_batch": 2})
    assert any(note.endswith("no larger global_batch brings it under 5 %") for note in plan.notes)


def test_notes_say_what_is_assumed_and_what_is_idle() -> None:
    settings = {"placement": "shard", "gpus_per_group": 4, "global_batch": 12}
    notes = planned("llama-7b", nodes(8, 6, network=None), settings).notes
    assert any(
        note.startswith("no network was given: 10 Gbit/s and 0.1 ms between nodes are assumed") for note in notes
    )
    assert "2 GPUs of node1 idle: groups of 4 do not go into its 6" in notes
