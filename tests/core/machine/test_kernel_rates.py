from typing import Any

import msgspec
import pytest

from qdist.core.machine.kernel_rates import (
    PRODUCT_S,
    AttentionRate,
    KernelRates,
    attention_seconds,
    fit_products,
    slowest_kernels,
    usual_kernel_rates,
)

USUAL = usual_kernel_rates(673e12, 4.177e12)


def rates(**changes: Any) -> KernelRates:
    return msgspec.structs.replace(USUAL, **changes)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim", "backward", "milliseconds"),
    [
        (16, 32, 512, 128, False, 0.1003),
        (16, 32, 512, 128, True, 0.4131),
        (4, 32, 2048, 128, False, 0.2650),
        (4, 32, 2048, 128, True, 0.8715),
        (16, 32, 512, 64, False, 0.0798),
        (8, 16, 512, 256, True, 0.3427),
    ],
)
def test_attention_takes_what_an_h200_took(
    batch: int, heads: int, length: int, head_dim: int, backward: bool, milliseconds: float
) -> None:
    flops = 2.0 * batch * length * length * heads * head_dim
    seconds = attention_seconds(USUAL, head_dim, length, flops, backward=backward)
    assert seconds == pytest.approx(milliseconds / 1e3, rel=0.02)


def test_attention_over_longer_rows_is_faster_for_its_work() -> None:
    times = [attention_seconds(USUAL, 96, length, 1e12, backward=False) for length in (256, 1024, 4096, 16_384)]
    assert times == sorted(times, reverse=True)
    assert times[2] < 1.5 * times[3]


def test_attention_of_one_measured_length_has_one_rate() -> None:
    one = rates(attention=(AttentionRate(head_dim=64, length=512, forward_flops_s=1e12, backward_flops_s=5e11),))
    assert attention_seconds(one, 128, 2048, 3e12, backward=False) == 3.0
    assert attention_seconds(one, 128, 2048, 3e12, backward=True) == 15.0


def test_products_are_a_rate_and_a_start() -> None:
    sizes = [1e9, 4e9, 3e10, 7e10, 1e11, 3e11]
    rate, start = fit_products([(flops, flops / 800e12 + 4e-6) for flops in sizes])
    assert rate == pytest.approx(800e12, rel=0.05)
    assert start == pytest.approx(4e-6, rel=0.3)
    assert fit_products([(1e12, 2.0)]) == (5e11, PRODUCT_S)


def test_the_slowest_figure_of_each_card_counts() -> None:
    other = rates(
        dense_flops_s=1e12, product_s=1.0, graph_s=0.0,
        attention=(AttentionRate(head_dim=128, length=512, forward_flops_s=1e12, backward_flops_s=1e18),),
    )  # fmt: skip
    found = slowest_kernels([USUAL, other])
    assert found is not None
    assert (found.dense_flops_s, found.product_s, found.graph_s) == (1e12, 1.0, USUAL.graph_s)
    own = next(each for each in USUAL.attention if (each.head_dim, each.length) == (128, 512))
    assert found.attention == (msgspec.structs.replace(own, forward_flops_s=1e12),)


@pytest.mark.parametrize("several", [[], [None], [USUAL, None]])
def test_cards_that_nobody_measured_have_no_rates(several: list[KernelRates | None]) -> None:
    assert slowest_kernels(several) is None
