"""Do a GPU and the CPU find the same sums, by Triton's way and by torch's?"""

import pytest
import torch

from qdist.runtime.formats.checksum import slice_sums
from qdist.runtime.kernels import sums

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", ["triton", "torch"])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 4096, 16384, 16388, 65537, 80_000_004])
def test_sums_are_those_of_the_cpu(count: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    assert sums.usable(device)
    if way == "torch":
        monkeypatch.setattr(sums, "usable", lambda device: False)
    content = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    there = content.to(device)
    for first_byte in (0, 4, 8 * 10**9 + 12, 5):
        assert slice_sums(there, first_byte).tolist() == slice_sums(content, first_byte).tolist()


def test_a_machine_that_cannot_compile_sums_by_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(sums, "_kernel", fails)
    sums.usable.cache_clear()
    assert not sums.usable(torch.device("cuda:0"))
    monkeypatch.undo()
    sums.usable.cache_clear()
