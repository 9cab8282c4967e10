"""Does a model in use lie on as few GPUs as hold it, and does every GPU hold what it was given?"""

from itertools import combinations_with_replacement

import msgspec
import pytest

from qdist.core.errors import PlanError
from qdist.core.planning.inference import Footprint, Residence, footprint, reside, room
from qdist.core.text import GIB
from tests.core.planning.test_memory import facts_of

PARTS = Footprint(layers=(10,) * 8, waiting=(8,) * 8, staged=16, first=5, last=7, everywhere=3)


def held(parts: Footprint, residence: Residence) -> dict[int, int]:
    """Bytes on each GPU."""
    total = dict.fromkeys(residence.gpus, parts.everywhere + parts.staged * bool(residence.offloaded))
    for index, gpu in enumerate(residence.layer_gpu):
        total[gpu] += parts.layers[index] - parts.waiting[index] * (index in residence.offloaded)
    total[residence.layer_gpu[0]] += parts.first
    total[residence.layer_gpu[-1]] += parts.last
    return total


@pytest.mark.parametrize(
    ("rooms", "layer_gpu", "offloaded"),
    [
        ([95], (0,) * 8, ()),
        ([200, 200], (0,) * 8, ()),
        ([94, 95], (1,) * 8, ()),
        ([60, 60], (0,) * 4 + (1,) * 4, ()),
        ([2, 60, 60], (1,) * 4 + (2,) * 4, ()),
        ([60, 2, 60], (0,) * 4 + (2,) * 4, ()),
        ([60, 60, 2], (0,) * 4 + (1,) * 4, ()),
        ([28, 90], (0,) + (1,) * 7, ()),
        ([28, 28, 94], (0, 1) + (2,) * 6, ()),
        ([18, 18, 18, 94], (0, 2, *(3,) * 6), ()),
        ([94], (0,) * 8, (1, 4, 6)),
        ([47], (0,) * 8, tuple(range(8))),
    ],
)
def test_everything_lies_where_there_is_room(
    rooms: list[int], layer_gpu: tuple[int, ...], offloaded: tuple[int, ...]
) -> None:
    found = reside(PARTS, rooms)
    assert (found.layer_gpu, found.offloaded) == (layer_gpu, offloaded)
    assert all(bytes_ <= rooms[gpu] for gpu, bytes_ in held(PARTS, found).items())


def test_layers_that_cannot_be_cut_lie_on_one_gpu_with_some_in_host_memory() -> None:
    uncut = msgspec.structs.replace(PARTS, uncut=True)
    assert set(reside(PARTS, [60, 60]).layer_gpu) == {0, 1}
    found = reside(uncut, [60, 60])
    assert len(set(found.layer_gpu)) == 1
    assert found.offloaded


@pytest.mark.parametrize("first", range(20, 70, 7))
@pytest.mark.parametrize("second", range(20, 70, 7))
def test_no_gpu_is_overfull_and_no_layer_waits_without_need(first: int, second: int) -> None:
    """Against every way in which eight layers can lie on three GPUs."""
    rooms = [first, second, 47]
    found = reside(PARTS, rooms)
    assert found.gpus == tuple(sorted(found.gpus))
    assert all(bytes_ <= rooms[gpu] for gpu, bytes_ in held(PARTS, found).items())
    ways = [Residence(layer_gpu=way) for way in combinations_with_replacement(range(3), 8)]
    fits = any(all(bytes_ <= rooms[gpu] for gpu, bytes_ in held(PARTS, way).items()) for way in ways)
    assert fits == (not found.offloaded)


def test_what_does_not_fit_at_all_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"all 8 layers in host memory the model takes 47 B .* room for 46 B, 20 B"):
        reside(PARTS, [46, 20])
    with pytest.raises(PlanError, match=r"8 of 8 layers .* take 64 B; 63 B is free"):
        reside(PARTS, [47], host_bytes=63)
    assert reside(PARTS, [47], host_bytes=64).offloaded == tuple(range(8))


def llama_65b(cards: list[int], **settings: int) -> Residence:
    parts = footprint(
        facts_of("llama-65b"), bits=4, double_quant=True, compute_bytes=2, rank_r=64, **{"tokens": 2048, **settings}
    )
    return reside(parts, [room(int(card * GIB * 0.98), None) for card in cards])


def test_65b_lies_on_one_large_card_or_over_four_small_ones_and_waits_where_there_is_one_small_one() -> None:
    assert llama_65b([80, 80]) == Residence(layer_gpu=(0,) * 80)
    four = llama_65b([24] * 4)
    assert four.offloaded == ()
    assert [four.layer_gpu.count(gpu) for gpu in range(4)] == [20] * 4
    one = llama_65b([24])
    assert 30 < len(one.offloaded) < 65
    assert len(llama_65b([24], tokens=512).offloaded) < len(one.offloaded)


def test_a_card_is_filled_up_to_what_is_allowed_and_a_twentieth_is_kept() -> None:
    assert room(100, None) == room(100, 200) == 95
    assert room(100, 20) == 19


@pytest.mark.parametrize(
    ("residence", "text"),
    [
        (Residence(), "backbone on the CPU"),
        (Residence(layer_gpu=(1,) * 4), "backbone on GPU 1"),
        (Residence(layer_gpu=(0, 0, 0, 2)), "layers 0-2 on GPU 0, 3 on GPU 2"),
        (
            Residence(layer_gpu=(0,) * 4, offloaded=(1,)),
            "backbone on GPU 0; 1 of 4 layers are offloaded to host memory",
        ),
    ],
)
def test_where_a_model_lies_is_one_line(residence: Residence, text: str) -> None:
    assert str(residence) == text
