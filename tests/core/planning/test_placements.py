"""Every placement keeps the promises of `qdist.core.planning.placements.base`: the test to enter a new one into."""

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import msgspec
import pytest

from qdist.core.errors import Change, SpecError
from qdist.core.machine.cluster import Cluster
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.model.shapes import LayerRun, ModelFacts
from qdist.core.planning.placements.base import Layout
from qdist.core.planning.placements.registry import PLACEMENTS, last_resorts, layout_of, layouts, simplicity
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec, changed, flatten, nest, resolve
from qdist.core.spec.sections import Placement, Schedule
from tests.plans import CPU, gpus, planned

LAID: dict[str, tuple[Cluster, dict[str, Any]]] = {
    "replicate": (gpus(4, 80), {"placement": "replicate"}),
    "replicate on CPUs": (CPU, {"placement": "replicate", "gpus": 2}),
    "shard": (gpus(4, 24), {"placement": "shard"}),
    "shard in groups": (gpus(4, 24), {"placement": "shard", "gpus_per_group": 2}),
    "shard on CPUs": (CPU, {"placement": "shard", "gpus": 2}),
    "split": (gpus(4, 24), {"placement": "split"}),
    "split in groups": (gpus(4, 24), {"placement": "split", "gpus_per_group": 2}),
    "split on CPUs": (CPU, {"placement": "split", "gpus": 2}),
    "split, one process": (gpus(2, 24), {"split.schedule": "sequential"}),
    "split, one GPU": (gpus(1, 24), {"split.offload_layers": 3}),
}
"""Machines and settings that lay a backbone: one entry at least for each kind of layout that is registered."""
laid = pytest.mark.parametrize("name", LAID)
SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("placement", (None, *(placement.name for placement in PLACEMENTS))),
    ("gpus_per_group", (None, 1, 2)),
    ("split.schedule", (None, *get_args(Schedule))),
    ("split.offload_layers", (None, 2)),
    ("zero.stage", (None, 3)),
)


def layers(count: int) -> ModelFacts:
    facts = from_config(config_of("llama-7b"), name="m")
    return msgspec.structs.replace(facts, layers=(LayerRun(facts.shapes[0], count),))


def plan_of(name: str, **more: Any) -> Plan:
    cluster, settings = LAID[name]
    return planned("llama-7b", cluster, {"global_batch": 16, "seq_len": 128} | settings | more)


@pytest.fixture(scope="module")
def specs() -> list[RunSpec]:
    """Every combination of the settings that a placement looks at."""
    keys, choices = zip(*SETTINGS, strict=True)
    return [resolve(nest(dict(zip(keys, values, strict=True)))) for values in product(*choices)]


def offered(spec: RunSpec, count: int, device: Any) -> tuple[Sequence[Layout], SpecError | None]:
    """The layouts, or why there are none."""
    try:
        return layouts(spec, count, device=device), None
    except SpecError as error:
        return (), error


def is_way_out(spec: RunSpec, count: int, device: Any, way: Change, more: int = 2) -> bool:
    """Whether a change leads to a layout, if need be with one out of the next refusal."""
    count = way.get("gpus", count)
    spec = changed(spec, {key: value for key, value in way.items() if key != "gpus"})
    found, refused = offered(spec, count, device)
    ways = refused.ways if refused and more else ()
    return bool(found) or any(is_way_out(spec, count, device, each, more - 1) for each in ways)


def test_no_placement_is_left_out() -> None:
    kinds = [(kind.placement, kind.schedule) for placement in PLACEMENTS for kind in placement.kinds]
    assert tuple(placement.name for placement in PLACEMENTS) == get_args(Placement)
    assert all(kind.placement == placement.name for placement in PLACEMENTS for kind in placement.kinds)
    assert len(set(kinds)) == len(kinds)
    assert {(plan.placement, plan.schedule) for plan in map(plan_of, LAID)} == set(kinds)
    assert all(placement.without.keys() <= flatten(RunSpec()).keys() for placement in PLACEMENTS)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_grid_that_is_offered_uses_all_gpus(count: int, device: Any, specs: list[RunSpec]) -> None:
    for spec in specs:
        found, _ = offered(spec, count, device)
        assert [simplicity(layout) for layout in found] == sorted(map(simplicity, found))
        for layout in found:
            assert layout.groups * layout.gpus_per_group == count == layout.world_size * layout.world_on().gpus_per_rank
            assert spec.gpus_per_group in (None, layout.gpus_per_group)
            assert spec.placement in (None, layout.placement)
            assert layout.world_size == layout.data_parallel * layout.stages
            assert layout.positions in (1, layout.gpus_per_group)
            assert layout in layout.state_ways(resolve())
            assert layout.zero_stage == 0 or layout.engine == "deepspeed"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_refusal_has_a_way_that_works(count: int, device: Any, specs: list[RunSpec]) -> None:
    for spec in specs:
        found, refused = offered(spec, count, device)
        ways = refused.ways if refused else ()
        assert found or any(is_way_out(spec, count, device, way) for way in ways), refused


@laid
def test_a_layout_that_a_run_cannot_have_is_refused_with_a_way_that_works(name: str) -> None:
    layout, spec = layout_of(plan_of(name)), resolve({"train": {"answers": 2}, "model": "m"})
    one, many = layers(1), layers(99)
    refusals = (
        layout.impossible(spec, one), layout.impossible(spec, many), layout.unable(spec, 0), layout.unable(spec, 3),
    )  # fmt: skip
    for refused in filter(None, refusals):
        assert refused.message
        assert any(is_way_out(spec, layout.groups * layout.gpus_per_group, "cuda", way) for way in refused.ways)
    assert layout.impossible(spec, many) is None
    assert layout.unable(resolve(), 0) is None


@laid
def test_a_plan_has_the_layout_that_was_offered(name: str) -> None:
    plan = plan_of(name)
    layout = layout_of(plan)
    found = layouts(plan.spec, plan.groups * plan.gpus_per_group, device=plan.device)
    assert layout in [own for each in found for own in each.state_ways(plan.spec)]
    assert (layout.world_size, layout.data_parallel) == (plan.world_size, plan.data_parallel)
    assert [rank.rank for rank in plan.ranks] == list(range(layout.world_size))
    assert all(len(rank.expected) == (len(rank.gpus) or 1) for rank in plan.ranks)
    if plan.device == "cuda":
        assert [gpu for rank in plan.ranks for gpu in rank.gpus] == list(range(layout.groups * layout.gpus_per_group))


@laid
def test_a_layer_lies_at_one_position_or_on_all(name: str) -> None:
    plan = plan_of(name)
    layout = layout_of(plan)
    assert list(plan.layer_map) == sorted(plan.layer_map)
    assert len(plan.layer_map) in (0, plan.facts.layer_count)
    assert set(plan.layer_map) in (set(), set(range(layout.positions)))
    assert bool(plan.layer_map) or layout.positions == 1


@laid
def test_the_parts_of_a_group_are_together_the_backbone_at_least(name: str) -> None:
    plan, (whole,) = plan_of(name), planned("llama-7b", gpus(1, 80), {"seq_len": 128}).ranks
    held = sum(own.weights for rank in plan.ranks if rank.group == 0 for own in rank.expected)
    offloaded = len(plan.offloaded_layers) / plan.facts.layer_count
    packed = whole.expected[0].weights * (2 if plan.compute_dtype == "float32" else 1)
    assert held >= (1 - offloaded) * whole.expected[0].weights
    assert held <= plan.gpus_per_group * packed


@laid
def test_the_words_name_the_placement_and_its_numbers(name: str) -> None:
    plan = plan_of(name)
    layout = layout_of(plan)
    words, batch = layout.in_words(plan), layout.batch_in_words(plan)
    assert words.startswith(f"{plan.placement}: ")
    assert plan.groups == 1 or plan.gpus_per_group == 1 or f"{plan.groups} groups of {plan.gpus_per_group}" in words
    assert str(plan.gradient_accumulation) in batch
    assert f"{plan.micro_batch} sample" in batch
    assert plan.data_parallel == 1 or str(plan.data_parallel) in batch
    assert str(plan.groups * plan.gpus_per_group) in layout.gpus_in_words


@laid
def test_what_lost_says_why(name: str) -> None:
    own = layout_of(plan_of(name))
    for other in LAID:
        why = own.why_slower(layout_of(plan_of(other)), 8)
        assert why or own.overhead
        assert not why.endswith(".")


def test_a_last_resort_is_a_layout_of_all_gpus_whose_layers_may_be_offloaded(specs: list[RunSpec]) -> None:
    for spec, count in product(specs, (1, 2, 4)):
        for layout in last_resorts(spec, count):
            assert layout.groups * layout.gpus_per_group == count
            assert spec.placement in (None, layout.placement)
            assert spec.split.offload_layers is None
    assert last_resorts(resolve(), 4)
