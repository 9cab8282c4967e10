"""Packs small integers into 32-bit words as GPTQ checkpoints do, and unpacks them.

Along the first dimension the values follow each other bit by bit, the lowest bit first, so that 3-bit values cross from
word to word: 32 of them fill 3 words (AutoGPTQ's order; 2, 4 and 8 bits never cross).
"""

from math import gcd

import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import WORD


def period(bits: int) -> tuple[int, int]:
    """(values, words) after which the pattern repeats: (8, 1) for 4 bits, (32, 3) for 3."""
    common = gcd(bits, WORD)
    return WORD // common, bits // common


def require_whole_words(path: str, bits: int, *, inputs: int, outputs: int) -> None:
    """Raise ModelError if a linear's sizes do not fill whole words of `bits` bits."""
    values, _ = period(bits)
    for side, size in (("inputs", inputs), ("outputs", outputs)):
        if size % values:
            raise ModelError(
                f"{path} has {size} {side}, and {bits} bits fill words only with multiples of {values}",
                try_="--method qlora, whose NF4 takes any size",
            )


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of `bits` bits, [n, m], to int32 [n * bits / 32, m]. n must fill whole words: see `period`.

    Raises ValueError for values out of range or a length that does not fit.
    """
    count, words = period(bits)
    if values.shape[0] % count:
        raise ValueError(f"{values.shape[0]} values of {bits} bits do not fill words: a multiple of {count} does")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise ValueError(f"values {int(values.min())} to {int(values.max())} do not fit {bits} bits")
    wide = values.to(torch.int64).reshape(-1, count, values.shape[1])
    packed = torch.zeros(wide.shape[0], words, values.shape[1], dtype=torch.int64, device=values.device)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        packed[:, word] |= (wide[:, place] << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            packed[:, word + 1] |= wide[:, place] >> (WORD - shift)
    # The upper half of the range is that of negative numbers.
    signed = torch.where(packed >= 1 << (WORD - 1), packed - (1 << WORD), packed)
    return signed.reshape(-1, values.shape[1]).to(torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [w, m] to uint8 [w * 32 / bits, m], the inverse of `pack`."""
    count, per = period(bits)
    if words.shape[0] % per:
        raise ValueError(f"{words.shape[0]} words do not end with a value of {bits} bits: a multiple of {per} does")
    parts, mask = words.reshape(-1, per, words.shape[1]), (1 << bits) - 1
    values = torch.empty(parts.shape[0], count, words.shape[1], dtype=torch.uint8, device=words.device)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        value = parts[:, word] >> shift  # copies the sign, which the mask takes off again
        if shift + bits > WORD:
            low = WORD - shift
            value = (value & ((1 << low) - 1)) | (parts[:, word + 1] << low)
        values[:, place] = (value & mask).to(torch.uint8)
    return values.reshape(-1, words.shape[1])


def pack_zeros(zeros: torch.Tensor, bits: int, offset: int, *, name: str = "qzeros") -> torch.Tensor:
    """Zeros [groups, out] as stored in the file, int32 [groups, out * bits / 32].

    offset: 1 where zeros are stored minus one (format gptq), which leaves no way to store 0; 0 in gptq_v2.
    Raises ModelError for a zero that the format cannot hold.
    """
    if offset and zeros.numel() and int(zeros.min()) < offset:
        count = int((zeros < offset).sum())
        raise ModelError(f"{name}: {count} zeros are 0, which the format gptq cannot hold", try_="the format gptq_v2")
    return pack((zeros.to(torch.int64) - offset).t(), bits).t().contiguous()


def unpack_zeros(qzeros: torch.Tensor, bits: int, offset: int) -> torch.Tensor:
    """int16 [groups, out]: the values that represent a weight of 0."""
    return unpack(qzeros.t(), bits).t().to(torch.int16) + offset


def group_of_inputs(inputs: int, group_size: int, device: torch.device | None = None) -> torch.Tensor:
    """The usual g_idx, int32 [inputs]: groups of consecutive inputs."""
    if group_size == -1:
        return torch.zeros(inputs, dtype=torch.int32, device=device)
    return torch.arange(inputs, dtype=torch.int32, device=device) // group_size


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    bits: int,
    offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """scale x (weight - zero), [in, out] in `dtype`, computed in float32.

    qweight: int32 [in * bits / 32, out]. qzeros: int32 [groups, out * bits / 32]. scales: [groups, out].
    groups: int [in], the group of each input.
    """
    zeros = unpack_zeros(qzeros, bits, offset).to(torch.float32)
    wide, rows = scales.to(torch.float32), groups.long()
    values = unpack(qweight, bits).to(torch.float32)
    return ((values - zeros[rows]) * wide[rows]).to(dtype)
