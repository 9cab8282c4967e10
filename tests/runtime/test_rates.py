"""The measuring itself, small and on the CPU: what it reports must be complete, and its comparison must see errors."""

from pathlib import Path

import pytest
import torch

from qdist.core.machine.measured import slowest
from qdist.host.launch import measuring
from qdist.runtime.gpu_rates import _wrong, pattern

CPU = torch.device("cpu")


def test_a_pattern_holds_every_byte_and_every_kind_of_nan() -> None:
    data = pattern(1 << 20, seed=3, device=CPU)
    assert len(data.unique()) == 256
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert int(data.view(dtype).isnan().sum()) > 100
    assert abs(float(data.float().mean()) - 127.5) < 0.5


def test_patterns_of_two_ranks_differ_nearly_everywhere() -> None:
    one, other = (pattern(100_002, seed=seed, device=CPU) for seed in (0, 1))
    assert one.numel() == 100_002
    assert _wrong(one, other) > 99_000
    assert _wrong(one, one.clone()) == 0


def test_one_changed_byte_is_seen() -> None:
    data = pattern(4096, seed=0, device=CPU)
    changed = data.clone()
    changed[77] ^= 1
    assert _wrong(changed, data) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_measure_and_report_to_the_end(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    found = measuring.measure(ranks, device="cpu", timeout_s=120)
    assert found.problem == ""
    assert [card.rank for card in found.cards] == list(range(ranks))
    for card in found.cards:
        assert 0.1 < card.round_trip_error < 0.16
        assert card.round_trip_differs == 0.0
        assert (card.links is None) == (ranks == 1)
        if card.links is not None:
            assert card.links.checked_bytes == 2 << 20
            assert (card.links.wrong_gathered_bytes, card.links.wrong_reduced_values) == (0, 0)
    rates = slowest(found.cards, source="measured")
    assert rates is not None
    assert min(rates.matmul_flops_s, rates.memory_bytes_s, rates.link_bytes_s, rates.host_bytes_s) > 1e6
