"""Random bits that are a function of numbers, not of a generator's state: a CPU and a GPU make the same ones.

Everything is int32 arithmetic that wraps.
"""

import torch

FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Multipliers of lowbias32 (Wellons 2018), as int32."""


def as_int32(values: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 values."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def mixed(value: torch.Tensor) -> torch.Tensor:
    """lowbias32: a bijection of int32 in which each bit of the input reaches all of the output."""
    value = (value ^ ((value >> 16) & 0xFFFF)) * FIRST
    value = (value ^ ((value >> 15) & 0x1FFFF)) * SECOND
    return value ^ ((value >> 16) & 0xFFFF)
