"""How are weights packed, and how many bytes does it take?"""

from math import ceil
from typing import Literal

import msgspec

from qdist.core.spec.run_spec import RunSpec

FORMAT = 1
"""Version of the packed format: raise it whenever the same source would be packed to other bytes or files."""
BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes: weights per absmax, and absmaxes per second-level absmax when quantized in turn."""


class Packing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the weights are packed."""

    bits: Literal[4, 8, 16]
    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type; at other widths this and `double` keep their defaults, so that equal packings compare equal."""
    double: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the tensors that are not packed; auto keeps that of the source."""

    @property
    def method(self) -> str:
        """nf4, fp4, int8 or 16-bit."""
        return {4: self.type, 8: "int8", 16: "16-bit"}[self.bits]

    def __str__(self) -> str:
        plain = self.bits == 4 and not self.double
        return f"{self.method} without double quantization" if plain else self.method


def matrix_bytes(inputs: int, outputs: int, *, bits: int, double: bool = True, plain_bytes: int = 2) -> int:
    """Bytes of a packed matrix, and of what its quantization needs to undo itself.

    bits: 4, 8 or 16. double: quantize the absmaxes of 4-bit weights too. plain_bytes: of a weight that is not packed.
    """
    if bits == 16:
        return inputs * outputs * plain_bytes
    if bits == 8:
        return inputs * outputs + 4 * outputs  # LLM.int8: an fp32 scale for each output row
    blocks, nested = blocks_of(inputs * outputs)
    # QLoRA section 3: absmax in fp32, or in 8 bits with an fp32 absmax of its own and one fp32 offset.
    return ceil(inputs * outputs / 2) + (blocks + 4 * nested + 4 if double else 4 * blocks)


def blocks_of(weights: int) -> tuple[int, int]:
    """Number of absmaxes of this many 4-bit weights, and of their own absmaxes when quantized in turn."""
    blocks = ceil(weights / BLOCK)
    return blocks, ceil(blocks / NESTED_BLOCK)


def packing_of(spec: RunSpec) -> Packing:
    """How a run's weights are packed, unless they come as GPTQ."""
    return msgspec.convert({"bits": spec.bits, "type": spec.quant.type, "double": spec.quant.double}, Packing)
