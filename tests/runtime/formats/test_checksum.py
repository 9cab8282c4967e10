"""Checksums of slices add up, and see what changed."""

from itertools import pairwise

import pytest
import torch

from qdist.runtime.formats import checksum
from qdist.runtime.formats.checksum import FEW_BYTES, MODULUS, add_checksums, slice_checksum, tensor_checksum


def reference(content: bytes) -> tuple[int, int]:
    padded = content + b"\0" * (-len(content) % 4)
    words = [int.from_bytes(padded[at : at + 4], "little", signed=True) for at in range(0, len(padded), 4)]
    return sum(words) % MODULUS, sum(place * word for place, word in enumerate(words, 1)) % MODULUS


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("chunk_words", [3, 1024, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1000, 70_001])
def test_sums_of_slices_add_up_wherever_they_are_cut(
    count: int, chunk_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if count > 1000 and chunk_words < 1024:
        count = 5000
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", {"cpu": chunk_words})
    monkeypatch.setattr(checksum, "_ROW_WORDS", 16)
    monkeypatch.setattr(checksum, "_FEW_WORDS", 100)
    whole = random_bytes(count)
    expected = reference(bytes(whole.tolist()))
    assert slice_checksum(whole, 0) == expected
    for seed in range(8):
        inner = torch.randint(0, count + 1, (3,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
        cuts = [0, *inner, count]
        parts = [slice_checksum(whole[start:stop], start) for start, stop in pairwise(cuts)]
        assert add_checksums(*parts) == expected


def test_a_changed_byte_and_two_swapped_words_show() -> None:
    content = random_bytes(4096)
    changed, swapped = content.clone(), content.clone()
    changed[1001] ^= 1
    swapped[0:4], swapped[400:404] = content[400:404], content[0:4]
    plain, weighted = slice_checksum(content, 0)
    assert slice_checksum(changed, 0)[0] != plain
    assert slice_checksum(swapped, 0)[0] == plain
    assert slice_checksum(swapped, 0)[1] != weighted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_the_checksum_of_a_tensor_is_that_of_its_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(120).reshape(10, 12).to(dtype)
    content = bytes(tensor.t().contiguous().reshape(-1).view(torch.uint8).tolist())
    assert tensor_checksum(tensor.t()) == reference(content)
    assert tensor_checksum(torch.tensor(7, dtype=dtype)) == reference(
        bytes(torch.tensor([7], dtype=dtype).view(torch.uint8).tolist())
    )


def test_only_flat_bytes_have_a_checksum() -> None:
    with pytest.raises(ValueError, match="uint8"):
        slice_checksum(torch.zeros(4), 0)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 4095, 70_001, FEW_BYTES])
def test_few_bytes_have_the_sums_of_any_bytes(count: int) -> None:
    content = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    assert tensor_checksum(content) == slice_checksum(content, 0)
    if count % 4 == 0:
        assert tensor_checksum(content.view(torch.float32)) == slice_checksum(content, 0)
