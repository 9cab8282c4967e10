"""Which layouts does a spec allow, and who keeps the adapter's state?"""

from typing import Any

import pytest

from qdist.core.errors import SpecError
from qdist.core.planning.placements.base import Layout
from qdist.core.planning.placements.registry import layouts, simplicity
from qdist.core.spec.run_spec import nest, resolve


def named(layout: Layout) -> str:
    return f"{layout.schedule or layout.placement} {layout.groups}x{layout.gpus_per_group}"


def found(settings: dict[str, Any], count: int, device: Any = "cuda") -> list[Layout]:
    return list(layouts(resolve(nest(settings)), count, device=device))


EVERYTHING = ["replicate 4x1", "shard 1x4", "shard 2x2", "1f1b 1x4", "1f1b 2x2", "sequential 1x4"]
GRID: list[tuple[dict[str, Any], int, list[str]]] = [
    ({}, 1, ["replicate 1x1"]),
    ({}, 4, EVERYTHING),
    ({}, 3, ["1f1b 1x3", "replicate 3x1", "sequential 1x3", "shard 1x3"]),
    ({"gpus_per_group": 2}, 4, ["1f1b 2x2", "shard 2x2"]),
    ({"gpus_per_group": 4}, 4, ["1f1b 1x4", "sequential 1x4", "shard 1x4"]),
    ({"gpus_per_group": 1}, 4, ["replicate 4x1"]),
    ({"placement": "replicate"}, 4, ["replicate 4x1"]),
    ({"placement": "shard"}, 4, ["shard 1x4"]),
    ({"placement": "shard", "gpus_per_group": 2}, 4, ["shard 2x2"]),
    ({"placement": "split"}, 4, ["1f1b 1x4", "sequential 1x4"]),
    ({"placement": "split", "gpus_per_group": 2}, 4, ["1f1b 2x2"]),
    ({"placement": "split"}, 1, ["sequential 1x1"]),
    ({"split.schedule": "1f1b"}, 4, ["1f1b 1x4"]),
    ({"split.schedule": "sequential"}, 4, ["sequential 1x4"]),
    ({"split.offload_layers": 3}, 4, ["sequential 1x4"]),
    ({"split.offload_layers": 3}, 1, ["sequential 1x1"]),
    ({"zero.stage": 3}, 4, ["replicate 4x1", "shard 1x4", "shard 2x2"]),
    ({"zero.offload": "cpu"}, 4, ["replicate 4x1", "shard 1x4", "shard 2x2"]),
    ({"zero.stage": 2}, 4, ["1f1b 2x2", "replicate 4x1", "shard 1x4", "shard 2x2"]),
]


@pytest.mark.parametrize(("settings", "count", "expected"), GRID)
def test_a_spec_allows_these_layouts(settings: dict[str, Any], count: int, expected: list[str]) -> None:
    grid = found(settings, count)
    assert sorted(map(named, grid)) == sorted(expected)
    assert [simplicity(layout) for layout in grid] == sorted(map(simplicity, grid))
    assert all(layout.groups * layout.gpus_per_group == count for layout in grid)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["replicate 4x1"]),
        ({"gpus_per_group": 2}, ["shard 2x2", "1f1b 2x2"]),
        ({"placement": "shard"}, ["shard 1x4"]),
        ({"placement": "split"}, ["1f1b 1x4"]),
    ],
)
def test_cpu_ranks_replicate_unless_told(settings: dict[str, Any], expected: list[str]) -> None:
    assert list(map(named, found(settings, 4, "cpu"))) == expected


def test_one_process_visits_gpus_and_not_cpu_ranks() -> None:
    with pytest.raises(SpecError, match="visits GPU after GPU, and there is none here") as caught:
        found({"split.schedule": "sequential"}, 4, "cpu")
    assert caught.value.try_ == "--set split.schedule=1f1b"


STATE: list[tuple[dict[str, Any], int, tuple[int, str, int, int]]] = [
    # settings, GPUs -> ZeRO stage, engine, ranks, micro-batches at a time
    ({"placement": "replicate"}, 1, (0, "torch", 1, 1)),
    ({"placement": "replicate", "zero.stage": 1}, 1, (1, "deepspeed", 1, 1)),
    ({"placement": "replicate", "zero.offload": "cpu"}, 1, (2, "deepspeed", 1, 1)),
    ({"placement": "replicate"}, 4, (2, "deepspeed", 4, 4)),
    ({"placement": "replicate", "zero.stage": 0}, 4, (0, "torch", 4, 4)),
    ({"placement": "shard"}, 4, (2, "deepspeed", 4, 4)),
    ({"placement": "shard", "gpus_per_group": 2, "zero.stage": 3}, 4, (3, "deepspeed", 4, 4)),
    ({"placement": "split", "split.schedule": "1f1b"}, 4, (0, "torch", 4, 1)),
    ({"placement": "split", "split.schedule": "1f1b", "gpus_per_group": 2}, 4, (2, "deepspeed", 4, 2)),
    ({"placement": "split", "gpus_per_group": 2, "zero.stage": 1}, 4, (1, "deepspeed", 4, 2)),
    ({"split.schedule": "sequential"}, 4, (0, "torch", 1, 1)),
]


@pytest.mark.parametrize(("settings", "count", "expected"), STATE)
def test_zero_divides_the_adapter_among_those_who_see_other_samples(
    settings: dict[str, Any], count: int, expected: tuple[int, str, int, int]
) -> None:
    (layout,) = found(settings, count)
    assert (layout.zero_stage, layout.engine, layout.world_size, layout.data_parallel) == expected


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"gpus_per_group": 3}, 4, "gpus_per_group=3, but 4 GPUs cannot be divided so", "--gpus-per-group 2"),
    ({"gpus_per_group": 8}, 4, "gpus_per_group=8, but 4 GPUs cannot be divided so", "--gpus-per-group 4"),
    ({"placement": "replicate", "gpus_per_group": 2}, 4, "puts the whole backbone on each", "--placement shard"),
    ({"placement": "shard"}, 1, "placement=shard needs at least 2 GPUs in a group", "--gpus 2"),
    ({"placement": "shard", "gpus_per_group": 1}, 4, "needs at least 2 GPUs in a group", "--gpus-per-group 4"),
    ({"split.schedule": "1f1b"}, 1, "split.schedule=1f1b needs at least 2 GPUs in a group", "--gpus 2"),
    ({"placement": "shard", "split.schedule": "1f1b"}, 4, "split.* describes placement=split, not shard",
     "--placement split"),
    ({"split.schedule": "1f1b", "split.offload_layers": 2}, 4, "goes with one process",
     "--set split.schedule=sequential"),
    ({"split.schedule": "sequential", "gpus_per_group": 2}, 4, "one process over all GPUs, not 2 groups of 2",
     "--gpus-per-group 4"),
    ({"placement": "split", "zero.offload": "cpu"}, 4, "zero.offload=cpu does not go with a split backbone",
     "--placement shard"),
    ({"placement": "split", "zero.stage": 3}, 4, "zero.stage=3 does not go with a split backbone",
     "--placement shard"),
    ({"placement": "split", "zero.stage": 2}, 4, "a split over 4 GPUs is one group",
     "--set zero.stage=auto"),
    ({"placement": "split", "zero.stage": 2}, 3, "a split over 3 GPUs is one group", "--set zero.stage=auto"),
    ({"split.schedule": "sequential", "zero.stage": 2}, 4, "is one group", "--set zero.stage=auto"),
    ({"placement": "split", "gpus_per_group": 1}, 4, "placement=split needs at least 2 GPUs in a group, not gpus_per_",
     "--gpus-per-group 4"),
    ({"gpus_per_group": 2}, 1, "gpus_per_group=2, but 1 GPU cannot be divided so", "--gpus-per-group 1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "count", "message", "attempt"), REFUSED)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], count: int, message: str, attempt: str
) -> None:
    with pytest.raises(SpecError) as caught:
        found(settings, count)
    assert message in caught.value.message
    assert caught.value.try_ == attempt


def test_one_cpu_rank_cannot_split_a_backbone() -> None:
    with pytest.raises(SpecError, match="placement=split needs at least 2 CPU ranks in a group") as caught:
        found({"placement": "split"}, 1, "cpu")
    assert caught.value.try_ == "--gpus 2"


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(SpecError, match="needs a GPU to copy layers to"):
        found({"split.offload_layers": 2}, 1, "cpu")


@pytest.mark.parametrize(
    "settings",
    [{"placement": "shard", "gpus_per_group": 1}, {"placement": "split", "gpus_per_group": 1}, {"gpus_per_group": 3}],
)
def test_where_there_is_no_gpu_none_is_spoken_of(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="CPU ranks") as caught:
        found(settings, 4, "cpu")
    assert "GPU" not in caught.value.message
