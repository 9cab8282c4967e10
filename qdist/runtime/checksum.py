"""Checksums of bytes that lie in slices on several ranks: a slice has its sums, and the sums add up."""

import torch

MODULUS = 1 << 64
_ROW_WORDS = 1 << 11
_CHUNK_WORDS = {"cpu": 1 << 20, "cuda": 1 << 21}
"""What fits a CPU's cache; what keeps a GPU busy and leaves its memory alone: sums there make a copy in 64 bits."""


def slice_checksum(flat_bytes: torch.Tensor, first_byte: int) -> tuple[int, int]:
    """Two sums modulo 2**64 over a slice of a byte string; see `slice_sums`.

    flat_bytes: uint8, one-dimensional, on any device.
    first_byte: where the slice begins in the whole.
    """
    plain, weighted = slice_sums(flat_bytes, first_byte).tolist()
    return plain % MODULUS, weighted % MODULUS


def slice_sums(flat_bytes: torch.Tensor, first_byte: int) -> torch.Tensor:
    """The two sums of `slice_checksum` as int64 [2], where the bytes are: what an all-reduce adds up over ranks.

    With the whole read as little-endian signed 32-bit words w_0, w_1, ...: the sum of w_k, and that of (k + 1) * w_k,
    both modulo 2**64. Each byte adds its own share, so sums of slices add up wherever the whole was cut. The weights
    make a swap of two words show. Nothing as large as the slice is made, unless it begins within a word: then chunks
    are copied, one at a time.
    """
    if flat_bytes.dtype != torch.uint8 or flat_bytes.dim() != 1:
        raise ValueError(f"a checksum is over uint8 [n], not {flat_bytes.dtype} {list(flat_bytes.shape)}")
    sums = torch.zeros(2, dtype=torch.int64, device=flat_bytes.device)
    chunk_bytes = 4 * _CHUNK_WORDS[flat_bytes.device.type]
    start = 0
    while start < flat_bytes.numel():
        # Each chunk ends at a word of the whole.
        lead = (first_byte + start) % 4
        stop = min(flat_bytes.numel(), start + chunk_bytes - lead)
        words = _words(flat_bytes[start:stop], lead)
        sums += _chunk_sums(words, (first_byte + start) // 4)
        start = stop
    return sums


def tensor_checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """The checksum of a whole tensor's bytes, as they lie in a file."""
    return slice_checksum(tensor.detach().contiguous().reshape(-1).view(torch.uint8), 0)


def add_checksums(*checksums: tuple[int, int]) -> tuple[int, int]:
    """The checksum of the whole from those of its slices."""
    return sum(plain for plain, _ in checksums) % MODULUS, sum(weighted for _, weighted in checksums) % MODULUS


def _words(chunk: torch.Tensor, lead: int) -> torch.Tensor:
    """Bytes as int32 words, with zeros for the bytes of the first and last word that belong to other slices."""
    count = lead + chunk.numel()
    if lead == 0 and count % 4 == 0 and chunk.data_ptr() % 4 == 0 and chunk.storage_offset() % 4 == 0:
        return chunk.view(torch.int32)
    padded = torch.zeros(-(-count // 4) * 4, dtype=torch.uint8, device=chunk.device)
    padded[lead:count] = chunk
    return padded.view(torch.int32)


def _chunk_sums(words: torch.Tensor, first_word: int) -> torch.Tensor:
    """Both sums of a chunk, by rows and columns: sum((r * width + c) * w) needs no vector of positions a word."""
    if words.device.type == "cpu":
        words = words.long()  # a sum that widens as it goes is ten times slower there
    rows = words.numel() // _ROW_WORDS
    table, rest = words[: rows * _ROW_WORDS].view(rows, _ROW_WORDS), words[rows * _ROW_WORDS :].long()
    by_row, by_column = table.sum(1, dtype=torch.int64), table.sum(0, dtype=torch.int64)
    plain = by_row.sum() + rest.sum()
    within = (by_row * _positions(by_row)).sum() * _ROW_WORDS + (by_column * _positions(by_column)).sum()
    within += (rest * (_positions(rest) + rows * _ROW_WORDS)).sum()
    return torch.stack((plain, within + (first_word + 1) * plain))


def _positions(values: torch.Tensor) -> torch.Tensor:
    return torch.arange(values.numel(), device=values.device)
