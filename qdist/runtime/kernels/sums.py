"""The checksums of `qdist.runtime.formats.checksum` on a GPU, in two launches per tensor to torch's thirty."""

from functools import cache
from subprocess import SubprocessError
from typing import Any

import torch

from qdist.runtime.kernels.launching import LAUNCHING, on_device

_WORDS = 1 << 12
"""Words per program."""


@cache
def usable(device: torch.device) -> bool:
    """Whether Triton is installed and can compile.

    It needs a C compiler and Python's headers, which a machine that only trains may lack.
    """
    try:
        return word_sums(torch.ones(3, dtype=torch.int32, device=device)).tolist() == [3, 6]
    except (ImportError, OSError, RuntimeError, SubprocessError):
        return False


def word_sums(words: torch.Tensor) -> torch.Tensor:
    """int32 [n] on a GPU: the sums of w_k and of (k + 1) * w_k as int64 [2], both modulo 2**64."""
    programs = -(-words.numel() // _WORDS)
    parts = torch.empty((programs, 2), dtype=torch.int64, device=words.device)
    with LAUNCHING, on_device(words.device):
        _kernel()[(programs,)](words, parts, words.numel(), WORDS=_WORDS, num_warps=4)
    return parts.sum(0)


@cache
def _kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["count"])
    def add_up(words, parts, count, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0)
        place = program.to(tl.int64) * WORDS + tl.arange(0, WORDS)
        value = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
        tl.store(parts + 2 * program, tl.sum(value, axis=0))
        tl.store(parts + 2 * program + 1, tl.sum(value * (place + 1), axis=0))

    return add_up
