"""What are weights packed to?"""

from typing import Literal

import msgspec

from qdist.core.spec.spec import RunSpec

FORMAT = 1
"""Raise it whenever the same source would be packed to other bytes or files."""


class Packing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the weights are packed to."""

    bits: Literal[4, 8, 16]
    type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits; the defaults otherwise, so that equal packings are equal."""
    double: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of what is not packed; auto leaves every tensor as the source has it."""

    @property
    def method(self) -> str:
        """nf4, fp4, int8 or 16-bit."""
        return {4: self.type, 8: "int8", 16: "16-bit"}[self.bits]

    def __str__(self) -> str:
        plain = self.bits == 4 and not self.double
        return f"{self.method} without double quantization" if plain else self.method


def packing_of(spec: RunSpec) -> Packing:
    """What a run's weights are packed to, unless they come as GPTQ."""
    return msgspec.convert({"bits": spec.bits, "type": spec.quant.type, "double": spec.quant.double}, Packing)
