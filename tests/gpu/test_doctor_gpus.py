"""What `qdist doctor --gpus` measures on real cards: complete, plausible, exact, and under a minute."""

import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qdist.cli.main import main
from qdist.core.machine.measured import slowest
from qdist.host.launch import measuring
from qdist.host.machine import probe
from qdist.runtime.gpu_rates import pattern


def need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPU(s), and this machine has {torch.cuda.device_count()}")


@pytest.mark.gpu
def test_a_pattern_is_the_same_on_a_gpu_as_on_the_cpu() -> None:
    need(1)
    there, here = (pattern(1 << 22, seed=3, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert torch.equal(there.cpu(), here)


@pytest.mark.gpu
def test_one_gpu_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need(1)
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    found = measuring.measure(1)
    assert found.problem == ""
    (card,) = found.cards
    assert 1e13 < card.matmul_flops_s < 1e16
    assert 1e11 < card.memory_bytes_s < 1e14
    assert (card.round_trip_error < 0.16, card.round_trip_differs < 1e-3) == (True, True), card
    rates = slowest(found.cards, source="measured")
    assert rates is not None
    assert rates.kernels is not None
    assert 0.9 * rates.matmul_flops_s < rates.kernels.dense_flops_s < 2 * rates.matmul_flops_s
    assert 0.3 < rates.kernels.unpack_bytes_s / rates.memory_bytes_s < 1.5
    assert 1e-7 < rates.kernels.kernel_s < 2e-5
    assert all(own.backward_flops_s > 0 for own in rates.kernels.attention)


@pytest.mark.gpu2
@pytest.mark.distinct
def test_all_gpus_are_measured_in_under_a_minute_and_plans_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need(2)
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    began = time.monotonic()
    result = CliRunner().invoke(main, ["doctor", "--gpus"], prog_name="qdist")
    assert result.exit_code == 0, result.output
    assert time.monotonic() - began < 60, result.output
    assert "exact: " in result.output
    rates = probe.cluster().rates
    assert rates is not None
    assert rates.source.startswith("measured ")
    assert rates.link_bytes_s > 1e9
