"""Can a machine of different cards be described as one says it?"""

from typing import Any

import pytest

from qdist.core.errors import SpecError
from qdist.core.machine.cards import described, each_card
from qdist.core.machine.cluster import UNNAMED, Cluster
from qdist.core.text import GIB


def cards(machine: Cluster) -> list[tuple[str, int]]:
    assert [gpu.index for gpu in machine.gpus] == list(range(len(machine.gpus)))
    return [(gpu.name, gpu.total_bytes // GIB) for gpu in machine.gpus]


@pytest.mark.parametrize(
    ("gpus", "name", "memory", "expected"),
    [
        (None, None, "24GiB", [(UNNAMED, 24)]),
        (2, "RTX 3090", None, [("RTX 3090", 24)] * 2),
        (None, "rtx3090+rtx4090", None, [("rtx3090", 24), ("rtx4090", 24)]),
        (2, "A10 + 2 x L40S", None, [("A10", 24), ("L40S", 48), ("L40S", 48)]),
        (None, None, "2x24GiB+48GiB", [(UNNAMED, 24), (UNNAMED, 24), (UNNAMED, 48)]),
        (None, "RTX 4090", "24GiB + 48GiB", [("RTX 4090", 24), ("RTX 4090", 48)]),
        (None, "RTX 4090 + L4", "20GiB", [("RTX 4090", 20), ("L4", 20)]),
        (None, "RTX 4090 + L4", "24GiB+20GiB", [("RTX 4090", 24), ("L4", 20)]),
    ],
)
def test_a_machine_has_the_cards_that_are_named(
    gpus: int | None, name: str | None, memory: str | None, expected: list[tuple[str, int]]
) -> None:
    machine = described(gpus=gpus, gpu_name=name, gpu_memory=memory)
    assert cards(machine) == expected
    assert machine.cpu_count == 8 * len(expected)
    assert machine.memory_bytes == GIB * max(64, 2 * sum(gib for _, gib in expected))


@pytest.mark.parametrize(
    ("flags", "message", "way"),
    [
        ({"gpu_name": "RTX 3090+4090"}, "no card is known as '4090'", {"gpu_name": "RTX 3090+RTX 4090"}),
        ({"gpu_name": "RTX 3090+"}, "no card is known as ''", {"gpu_name": "RTX 4090"}),
        ({"gpu_name": "L4+T4", "gpu_memory": "8GiB+8GiB+9GiB"}, "2 cards are named, and memory .* for 3",
         {"gpu_memory": "8GiB"}),
        ({"gpu_memory": "24GiB+48"}, "'48' without a unit is 48 bytes", {"gpu_memory": "48GiB"}),
        ({"gpu_memory": "24GiB+8MiB"}, "a GPU of 8.0 MiB is too small", {"gpu_memory": "24GiB"}),
        ({"gpu_memory": "0x24GiB"}, "'0x24GiB' are no cards", {"gpu_memory": "24GiB"}),
        ({"gpu_name": "255xL4+2xT4"}, "are too many cards: .* 1 to 256", {"gpu_name": "T4"}),
    ],
)  # fmt: skip
def test_cards_that_cannot_be_are_refused(flags: dict[str, Any], message: str, way: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        described(gpus=None, **{"gpu_name": None, "gpu_memory": None, **flags})
    assert caught.value.ways[0] == way


def test_a_card_is_not_counted_by_the_x_in_its_name() -> None:
    assert each_card("RTX 3090", "gpu_name") == ("RTX 3090",)
    assert each_card("2xRTX 3090", "gpu_name") == each_card("2 X RTX 3090", "gpu_name") == ("RTX 3090",) * 2
