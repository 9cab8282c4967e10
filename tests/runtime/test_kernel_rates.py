"""The kernels that are measured, small, on the CPU, with a clock of ours: shapes must fit, and work be counted."""

from collections.abc import Callable

import pytest
import torch

from qdist.runtime import kernel_rates

CPU = torch.device("cpu")
MICROSECOND = 1e-6


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel runs once and takes a microsecond."""

    def seconds(device: torch.device, work: Callable[[], object], **_: int) -> float:
        work()
        return MICROSECOND

    monkeypatch.setattr(kernel_rates, "_seconds", seconds)
    monkeypatch.setattr(kernel_rates, "_graph_seconds", lambda device: (0.1 * MICROSECOND, MICROSECOND))
    monkeypatch.setattr(kernel_rates, "_fp8_rate", lambda device: 0.0)
    for name, value in {
        "_TOKENS": (8,), "_WIDTHS": ((64, 128),), "_WIDTH": 256, "_OUTPUTS": 128, "_ROWS": 16, "_PAIRS": 64,
        "_EXPERTS": 4, "_EXPERT_WIDTHS": (64, 32), "_ATTENTION": ((64, 8), (128, 16)),
    }.items():  # fmt: skip
        monkeypatch.setattr(kernel_rates, name, value)


def test_every_kernel_is_measured_and_its_work_counted() -> None:
    found = kernel_rates.measure_kernels(CPU, torch.bfloat16)
    assert found.dense_flops_s == pytest.approx(2 * 8 * 64 * 128 / MICROSECOND)
    assert found.grouped_flops_s == pytest.approx(2 * 64 * 64 * 32 / MICROSECOND)
    assert [(own.head_dim, own.length) for own in found.attention] == [(64, 8), (128, 16)]
    assert found.attention[0].forward_flops_s == pytest.approx(2 * 16 * 8 * 256 / MICROSECOND)
    assert found.traffic_bytes_s == pytest.approx(3 * 16 * 256 * 2 / MICROSECOND)
    assert found.thin_bytes_s == pytest.approx(16 * 256 * 2 / (0.85 * MICROSECOND))
    assert found.added_bytes_s == pytest.approx(2 * 16 * 256 * 2 / (0.9 * MICROSECOND))
    assert found.unpack_bytes_s == pytest.approx((2 + 0.5 + 1 / 64) * 256 * 128 / MICROSECOND, rel=0.01)


def test_experts_are_taken_to_be_slower_where_no_kernel_multiplies_them() -> None:
    found = kernel_rates.measure_kernels(CPU, torch.float32)
    assert found.grouped_flops_s == pytest.approx(0.6 * found.dense_flops_s)
