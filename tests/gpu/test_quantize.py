"""Packing on a GPU: transformers' bytes, and checksums as on the CPU."""

from pathlib import Path

import pytest
import torch

from qdist.core.model.storage import Packing
from qdist.runtime.formats.checksum import slice_checksum
from qdist.runtime.quantize.bitsandbytes import quantize
from tests.runtime.quantize.test_bitsandbytes import PACKINGS, by_transformers, loaded, tensors_in
from tests.runtime.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU(s), and this machine has 0"),
]


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_a_gpu_packs_the_bytes_that_transformers_packs_on_it(
    tmp_path: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qdist.runtime.quantize.pack._PIECE", 4096)
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize(str(tmp_path / "source"), tmp_path / "packed", packing)
    theirs = by_transformers(tmp_path / "source", packing, torch.bfloat16, device="cuda:0")
    ours, expected = tensors_in(tmp_path / "packed"), theirs.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], expected[name].cpu())] == []
    ids = torch.arange(64, device="cuda:0").reshape(2, 32)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "packed", "cuda:0")(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("first_byte", [0, 3])
def test_a_checksum_is_the_same_on_a_gpu(first_byte: int) -> None:
    content = torch.randint(0, 256, (200_000_003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert slice_checksum(content.cuda(), first_byte) == slice_checksum(content, first_byte)
    assert slice_checksum(content.cuda()[5:], first_byte) == slice_checksum(content[5:], first_byte)


def test_a_checksum_on_a_gpu_makes_nothing_large() -> None:
    content = torch.zeros(1 << 31, dtype=torch.uint8, device="cuda")
    slice_checksum(content, 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    slice_checksum(content, 0)
    assert torch.cuda.max_memory_allocated() - before < 1 << 26
