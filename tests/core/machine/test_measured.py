from typing import Any

import msgspec
import pytest

from qdist.core.machine.cluster import Rates
from qdist.core.machine.measured import CardRates, LinkRates, least, machine_key, slowest

LINKS = LinkRates(
    gather_bytes_s=300e9, reduce_bytes_s=250e9, peer_bytes_s=200e9, checked_bytes=4, wrong_gathered_bytes=0,
    wrong_reduced_values=0,
)  # fmt: skip
CARD = CardRates(
    rank=0, name="NVIDIA H200", dtype="bfloat16", matmul_flops_s=790e12, memory_bytes_s=4e12, linear_s=9e-4,
    round_trip_error=0.15, round_trip_differs=0.0, host_bytes_s=55e9, links=LINKS,
)  # fmt: skip


def card(**changes: Any) -> CardRates:
    return msgspec.structs.replace(CARD, **changes)


def test_each_figure_is_that_of_the_slowest_card() -> None:
    slow_links = msgspec.structs.replace(LINKS, gather_bytes_s=100e9)
    cards = (
        CARD,
        card(rank=1, matmul_flops_s=700e12),
        card(rank=2, host_bytes_s=20e9, linear_s=11e-4, links=slow_links),
    )
    assert slowest(cards, source="measured today") == Rates(
        matmul_flops_s=700e12,
        memory_bytes_s=4e12,
        link_bytes_s=100e9,
        host_bytes_s=20e9,
        linear_s=11e-4,
        source="measured today",
    )


def test_a_card_alone_would_go_through_the_host() -> None:
    found = slowest((card(links=None),), source="")
    assert found is not None
    assert found.link_bytes_s == found.host_bytes_s == 55e9


@pytest.mark.parametrize(
    "cards", [(), (card(host_bytes_s=None),), (CARD, card(rank=1, links=None)), (CARD, card(host_bytes_s=None))]
)
def test_what_was_not_measured_to_the_end_gives_no_rates(cards: tuple[CardRates, ...]) -> None:
    assert slowest(cards, source="") is None


def test_different_cards_are_as_slow_as_the_slowest_in_each_figure() -> None:
    one = Rates(matmul_flops_s=1, memory_bytes_s=4, link_bytes_s=1, host_bytes_s=4, source="table")
    other = Rates(matmul_flops_s=2, memory_bytes_s=3, link_bytes_s=2, host_bytes_s=3, source="table")
    assert least((one, other)) == Rates(
        matmul_flops_s=1, memory_bytes_s=3, link_bytes_s=1, host_bytes_s=3, source="table"
    )


def test_rates_hold_for_cards_by_name_and_number_in_any_order() -> None:
    assert machine_key(["B", "A", "B"], "580.1") == machine_key(["B", "B", "A"], "580.1") == "A_x1+B_x2_580.1"
    assert len({machine_key(["A"], "1"), machine_key(["A"], "2"), machine_key(["A", "A"], "1")}) == 3
