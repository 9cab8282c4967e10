"""How are weights packed, and how many bytes does it take?"""

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

import msgspec

from qdist.core.errors import ModelError, SpecError
from qdist.core.model.gptq import method_of
from qdist.core.model.shapes import Experts, Linear
from qdist.core.spec.run_spec import RunSpec

FORMAT = 1
"""Version of the packed format: raise it whenever the same source would be packed to other bytes or files."""
BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes: weights per absmax, and absmaxes per second-level absmax when quantized in turn."""
MX_BLOCK = 32
"""MXFP4: inputs that share a scale, a power of two in one byte (OCP microscaling formats, e8m0)."""

GgufType = Literal[
    "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "iq4_nl", "q4_0", "q4_k_s", "q4_k_m", "q4_1", "q5_0", "q5_k_s", "q5_k_m",
    "q6_k", "q8_0", "f16",
]  # fmt: skip
"""Types of GGUF files, by llama.cpp's names and from the smallest."""


class Packing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the weights are packed."""

    bits: Literal[4, 8, 16]
    type: Literal["nf4", "fp4", "mxfp4"] = "nf4"
    """4-bit data type; at other widths this and `double` keep their defaults, so that equal packings compare equal.
    mxfp4: experts as gpt-oss' checkpoints store them, beside linears in 16 bits."""
    double: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the tensors that are not packed; auto keeps that of the source."""

    @property
    def method(self) -> str:
        """nf4, fp4, mxfp4, int8 or 16-bit."""
        return {4: self.type, 8: "int8", 16: "16-bit"}[self.bits]

    @property
    def linear_bits(self) -> Literal[4, 8, 16]:
        """Bits of the weights of linears, which are not experts'."""
        return 16 if self.type == "mxfp4" else self.bits

    def __str__(self) -> str:
        plain = self.bits == 4 and not self.double and self.type != "mxfp4"
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


def experts_bytes(
    experts: Experts, *, bits: int, double: bool = True, mxfp4: bool = False, plain_bytes: int = 2
) -> int:
    """Bytes of the packed matrices of a layer's experts, each of which is packed by itself; biases are not in it."""
    each = (
        expert_matrix_bytes(experts, matrix, bits=bits, double=double, mxfp4=mxfp4, plain_bytes=plain_bytes)
        for matrix in experts.matrices
    )
    return experts.count * sum(each)


def expert_matrix_bytes(
    experts: Experts, matrix: Linear, *, bits: int, double: bool = True, mxfp4: bool = False, plain_bytes: int = 2
) -> int:
    """Bytes of one expert's packed matrix: absmaxes, their own absmaxes and an offset are of it alone."""
    if mxfp4:
        return matrix.outputs * ceil(matrix.inputs / MX_BLOCK) * (MX_BLOCK // 2 + 1)
    rows, columns = (matrix.inputs, matrix.outputs) if experts.transposed else (matrix.outputs, matrix.inputs)
    return matrix_bytes(columns, rows, bits=bits, double=double, plain_bytes=plain_bytes)


def stores_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint stores its experts in MXFP4. config: the content of its config.json."""
    stored = config.get("quantization_config")
    return isinstance(stored, Mapping) and stored.get("quant_method") == "mxfp4"


def quantized_as(config: Mapping[str, Any], *, name: str) -> Packing | None:
    """How a model is already packed, from its config.json; None if it is not.

    FP8 is read as if it were 16 bits. Raises ModelError for another packing than bitsandbytes' and MXFP4.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    method = method_of(stored) or "bitsandbytes"
    if method == "mxfp4":
        return Packing(bits=4, type="mxfp4", double=False)
    if method == "fp8":
        return None
    if method != "bitsandbytes":
        raise ModelError(f"{name} is quantized with {method}, which qdist does not read yet", try_="a 16-bit model")
    if stored.get("load_in_8bit"):
        return Packing(bits=8)
    kind, storage = stored.get("bnb_4bit_quant_type", "fp4"), stored.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ModelError(f"{name} stores its packed weights as {storage}, not uint8", try_="a 16-bit model")
    return Packing(bits=4, type=kind, double=bool(stored.get("bnb_4bit_use_double_quant")))


def packing_of(spec: RunSpec, config: Mapping[str, Any] | None = None) -> Packing:
    """How a run's weights are packed, unless they come as GPTQ.

    config: the content of the model's config.json, by which random weights go too.
    Raises SpecError for a width or type that a checkpoint in MXFP4 does not have.
    """
    if config is None or not stores_mxfp4(config):
        return msgspec.convert({"bits": spec.bits, "type": spec.quant.type, "double": spec.quant.double}, Packing)
    if spec.bits != 4 or spec.quant.type != "nf4" or not spec.quant.double:
        raise SpecError(
            f"the experts of {spec.model} are in MXFP4, 4 bits with a scale for 32 weights, and are trained on as they "
            f"come; this run wants {spec.bits} bits"
            + (f" of {spec.quant.type}" + " without double quantization" * (not spec.quant.double))
            * (spec.bits == 4),
            ways=[{"bits": 4, "quant.type": "nf4", "quant.double": True}],
        )
    return Packing(bits=4, type="mxfp4", double=False)
