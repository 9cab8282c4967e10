"""Do layers lie so that no GPU is fuller, and no stage slower, than needed?"""

import itertools

import pytest

from qdist.core.errors import PlanError
from qdist.core.planning.layer_map import balance, map_of, place_layers, scattered, spread_layers

PLACED: list[tuple[list[int], list[int], list[int]]] = [
    # bytes of each layer, room on each GPU -> layers on each
    ([10] * 8, [100, 100], [4, 4]),
    ([10] * 9, [100, 100], [5, 4]),
    ([10] * 80, [300, 600], [27, 53]),
    ([10] * 8, [80, 11], [7, 1]),
    ([10] * 3, [30, 30, 30], [1, 1, 1]),
    ([10] * 5, [100] * 4, [2, 2, 1, 0]),
    ([10] * 3, [100, 1, 1], [3, 0, 0]),
    ([10, 10, 10, 30], [40, 40], [3, 1]),
    ([30, 10, 10, 10], [40, 40], [1, 3]),
    ([1, 1, 50, 50, 1, 1], [60, 60], [3, 3]),
    ([10], [100], [1]),
    ([10, 10], [5, 100], [0, 2]),
]


def held(layer_bytes: list[int], layer_map: tuple[int, ...], gpus: int) -> list[int]:
    return [sum(size for size, at in zip(layer_bytes, layer_map, strict=True) if at == gpu) for gpu in range(gpus)]


@pytest.mark.parametrize(("layer_bytes", "rooms", "counts"), PLACED)
def test_layers_lie_in_order_and_where_there_is_room(
    layer_bytes: list[int], rooms: list[int], counts: list[int]
) -> None:
    layer_map = place_layers(layer_bytes, rooms)
    assert [layer_map.count(gpu) for gpu in range(len(rooms))] == counts
    assert list(layer_map) == sorted(layer_map)
    assert all(used <= room for used, room in zip(held(layer_bytes, layer_map, len(rooms)), rooms, strict=True))


@pytest.mark.parametrize(("layer_bytes", "rooms", "_"), [row for row in PLACED if len(row[0]) <= 10])
def test_no_gpu_is_fuller_than_the_best_of_all_assignments(layer_bytes: list[int], rooms: list[int], _: object) -> None:
    def fill(layer_map: tuple[int, ...]) -> float:
        used = held(layer_bytes, layer_map, len(rooms))
        return max(own / room for own, room in zip(used, rooms, strict=True))

    everything = itertools.combinations_with_replacement(range(len(rooms)), len(layer_bytes))
    assert fill(place_layers(layer_bytes, rooms)) == pytest.approx(min(map(fill, everything)))


@pytest.mark.parametrize(
    ("layer_bytes", "rooms", "message"),
    [
        ([2**30] * 4, [2**30, 2**30], r"1\.0 GiB are missing on GPU 0"),
        ([10, 10], [5, 15], "5 B are missing on GPU 1"),
        ([10] * 4, [-5, 100], "5 B are missing on GPU 0"),
    ],
)
def test_what_does_not_fit_names_the_gpu_and_the_missing_bytes(
    layer_bytes: list[int], rooms: list[int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        place_layers(layer_bytes, rooms)


def test_where_nothing_fits_every_gpu_overflows_alike() -> None:
    assert spread_layers([10] * 12, [10, 20]) == (0,) * 4 + (1,) * 8


@pytest.mark.parametrize(
    ("layers", "most", "extra", "counts"),
    [
        (80, [80] * 4, [0, 0, 0, 0], (20, 20, 20, 20)),
        (80, [80] * 4, [0, 0, 0, 3.9], (21, 21, 21, 17)),
        (82, [80] * 4, [0, 0, 0, 0], (20, 20, 21, 21)),
        (80, [15, 80, 80, 80], [0, 0, 0, 0], (15, 21, 22, 22)),
        (80, [80, 80, 80, 5], [0, 0, 0, 0], (25, 25, 25, 5)),
        (80, [20, 20, 20, 19], [0, 0, 0, 0], None),
        (80, [0, 80, 80, 80], [0, 0, 0, 0], None),
        (3, [9] * 4, [0, 0, 0, 0], None),
    ],
)
def test_stages_take_as_long_as_each_other(
    layers: int, most: list[int], extra: list[float], counts: tuple[int, ...] | None
) -> None:
    assert balance(layers, most, extra) == counts


def test_a_layer_map_says_for_each_layer_where_it_is() -> None:
    assert map_of((2, 1, 3)) == (0, 0, 1, 2, 2, 2)


@pytest.mark.parametrize("layers", [1, 2, 5, 32, 80, 126])
def test_offloaded_layers_have_even_gaps(layers: int) -> None:
    for count in range(layers + 1):
        chosen = scattered(layers, count)
        assert len(set(chosen)) == count
        gaps = [after - before for before, after in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert all(0 <= layer < layers for layer in chosen)
