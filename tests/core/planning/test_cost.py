"""What single kernels cost, against what an H200 took for them."""

from typing import Any

import msgspec
import pytest

from qdist.core.machine.cluster import Rates
from qdist.core.planning.cost import NOTHING, Cost, Kernels, clock, total
from qdist.core.planning.memory import TrainingShape

H200 = Rates(matmul_flops_s=673e12, memory_bytes_s=4177e9, link_bytes_s=255e9, host_bytes_s=54e9, source="measured")
JOB = TrainingShape(bits=4, rank_r=64, targets=("all-linear",), seq_len=512)


def kernels(tokens: int, **changes: Any) -> Kernels:
    return Kernels(H200, msgspec.structs.replace(JOB, **changes), tokens)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "fp8", "milliseconds"),
    [
        (8192, 4096, 4096, False, 0.3482),
        (8192, 11008, 4096, False, 0.9367),
        (1024, 4096, 4096, False, 0.0494),
        (1024, 4096, 11008, False, 0.1218),
        (8192, 4096, 4096, True, 0.1823),
        (1024, 4096, 11008, True, 0.0696),
    ],
)
def test_products_take_what_an_h200_took(
    tokens: int, inputs: int, outputs: int, fp8: bool, milliseconds: float
) -> None:
    assert kernels(tokens).product(inputs, outputs, fp8=fp8).gpu_s == pytest.approx(milliseconds / 1e3, rel=0.08)


def test_thin_products_and_unpacking_take_what_an_h200_took() -> None:
    one = kernels(8192)
    assert one.thin(4096, 64).gpu_s == pytest.approx(21.7e-6, rel=0.1)
    assert one.thin(11_008, 64).gpu_s == pytest.approx(54e-6, rel=0.1)
    assert one.added(4096, 64).gpu_s == pytest.approx(59.9e-6, rel=0.25)
    assert one.unpacked(11_008 * 4096, 0.516 * 11_008 * 4096).gpu_s == pytest.approx(37.7e-6, rel=0.1)


def test_a_product_of_few_rows_takes_the_reading_of_its_matrix() -> None:
    """The head of Gemma 3, which a chunk of 32 rows reads whole."""
    found = kernels(32).product(3840, 262_208)
    assert found.gpu_s == pytest.approx(2 * 3840 * 262_208 / 4177e9, rel=0.05)
    assert found.dense_s == 0.0


def test_products_in_32_bits_are_slow() -> None:
    assert kernels(4096, compute_bytes=4).product(4096, 4096).gpu_s > 10 * kernels(4096).product(4096, 4096).gpu_s


def test_costs_add_up() -> None:
    assert total([Cost(1.0, 2.0, 3.0), Cost(1.0, 1.0, 1.0) * 2]) == Cost(3.0, 4.0, 5.0)
    assert total([]) == NOTHING


@pytest.mark.parametrize(("cost", "share"), [(Cost(1.0, 0.0), 1 / 1.174), (Cost(0.0, 1.0), 1.0), (NOTHING, 1.0)])
def test_products_alone_lower_the_clock_to_the_sustained_rate(cost: Cost, share: float) -> None:
    assert clock(cost, H200) == pytest.approx(share)


def test_the_clock_falls_with_the_share_of_products() -> None:
    shares = [clock(Cost(dense, 1 - dense), H200) for dense in (0.2, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
