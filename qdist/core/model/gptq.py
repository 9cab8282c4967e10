"""What does a GPTQ checkpoint say of itself? `quantize_config.json`, and `quantization_config` of config.json.

GPTQ: Frantar et al. 2022. The files are AutoGPTQ's and GPTQModel's.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec

from qdist.core.errors import ModelError, SpecError
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import GPTQ_METHODS, Quant

BITS = (2, 3, 4, 8)
SHIFTED = "qdist-gptq-offset"
"""The `method` of a checkpoint with a `WeightOffset`. It has no `quant_method` and a `checkpoint_format` of its own, so
that transformers, vLLM and GPTQModel refuse it: they would read the packed tensors and leave the offsets out."""
_PLUS_OFFSET = "+offset"
METHODS = ("gptq", SHIFTED)
FORMATS = ("gptq", "gptq_v2")
"""v1 stores zeros minus one, v2 as they are."""
_OWN = "the configuration that came with the checkpoint"
WORD = 32
"""Bits of the integers that hold weights and zeros."""


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one linear is quantized."""

    bits: Literal[2, 3, 4, 8]
    group_size: int
    """Inputs that share a scale and a zero; -1: all of them."""

    def groups(self, inputs: int) -> int:
        """Number of rows of scales and zeros."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def tensors(self, inputs: int, outputs: int) -> dict[str, tuple[int, int]]:
        """Shapes of the tensors of a packed linear, by their names in files: weights and zeros as words, and scales."""
        groups = self.groups(inputs)
        return {
            "qweight": (inputs * self.bits // WORD, outputs),
            "qzeros": (groups, outputs * self.bits // WORD),
            "scales": (groups, outputs),
        }

    def bytes_of(self, inputs: int, outputs: int, *, scale_bytes: int = 2, ordered: bool = False) -> int:
        """Bytes of packed weights, zeros and scales; with `ordered` also of each input's group index."""
        packed = inputs * outputs * self.bits // 8
        zeros, scales = outputs * self.bits // 8, outputs * scale_bytes
        return packed + self.groups(inputs) * (zeros + scales) + 4 * inputs * ordered


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Linears that a checkpoint quantizes differently (GPTQModel's `dynamic`)."""

    pattern: str
    """A regular expression that module paths begin with."""
    shape: Shape | None
    """Shape of these linears; None if left in 16 bits."""


class WeightOffset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a merged QA-LoRA adapter adds to the weights of a group: W = scale x (weight - zero) + offset.

    Stored as `PATH.weight_offset`, [in / group_size, out], to be multiplied by `scale`.
    """

    group_size: int
    """Inputs that share an offset: a multiple of the GPTQ groups."""
    scale: float
    """A power of two that keeps small offsets out of float16's subnormal numbers."""
    dtype: Literal["float16", "float32"] = "float16"
    """float32 if float16 would lose too much of an adapter that is small beside those merged before it."""
    linears: tuple[str, ...]
    """Leaf names of the linears that have offsets."""
    base: str
    """SHA-256 over tensor names and checksums of the checkpoint merged into; all its tensors are here, unchanged."""

    def of(self, path: str) -> bool:
        """Whether the linear at a module path has offsets."""
        return path.rpartition(".")[2] in self.linears

    def bytes_of(self, inputs: int, outputs: int) -> int:
        """Bytes of the offsets of one linear."""
        return (4 if self.dtype == "float32" else 2) * (inputs // self.group_size) * outputs


class Gptq(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a checkpoint is quantized."""

    shape: Shape
    sym: bool = True
    """Whether every zero is half of the range."""
    desc_act: bool = False
    """Whether inputs were quantized in order of their activations, so that groups consist of scattered inputs."""
    format: Literal["gptq", "gptq_v2"] = "gptq"
    scales: Literal["float16", "bfloat16", "float32"] = "float16"
    """Dtype of the scales in the files; no configuration states it."""
    layer_bytes: int = 0
    """Bytes of packed linears in the largest decoder layer, if layers differ; 0 if they follow from the shape."""
    overrides: tuple[Override, ...] = ()
    offset: WeightOffset | None = None

    def of(self, path: str) -> Shape | None:
        """How the linear at a module path is quantized; None if it is not. The first matching override wins."""
        for override in self.overrides:
            if re.match(override.pattern, path):
                return override.shape
        return self.shape

    def bytes_of(self, name: str, inputs: int, outputs: int) -> int:
        """Bytes of a packed linear with its scales and zeros, and its offsets if it has any. name: its leaf name."""
        packed = self.shape.bytes_of(
            inputs, outputs, scale_bytes=4 if self.scales == "float32" else 2, ordered=self.desc_act
        )
        if self.offset is None or not self.offset.of(name):
            return packed
        return packed + self.offset.bytes_of(inputs, outputs)

    @property
    def group_sizes(self) -> frozenset[int]:
        """Group sizes of all quantized linears; -1 for a group as wide as the linear."""
        return frozenset((self.shape.group_size, *(e.shape.group_size for e in self.overrides if e.shape)))

    @property
    def zero_offset(self) -> int:
        """Number added to a stored zero."""
        return 1 if self.format == "gptq" else 0

    def __str__(self) -> str:
        size = "no groups" if self.shape.group_size == -1 else f"groups of {self.shape.group_size}"
        mixed = ", several widths" if any(e.shape and e.shape.bits != self.shape.bits for e in self.overrides) else ""
        merged = ", QA-LoRA merged" if self.offset else ""
        return f"GPTQ {self.shape.bits} bits, {size}" + ", activation order" * self.desc_act + mixed + merged


def of_run(spec: RunSpec, config: Mapping[str, object]) -> Gptq | None:
    """How the backbone of a run is quantized by GPTQ; None where it is not.

    config: the content of the model's config.json.
    Raises SpecError where the method and the model do not go together.
    """
    stored = config.get("quantization_config")
    there = isinstance(stored, Mapping) and method_of(stored) in METHODS
    if spec.method not in GPTQ_METHODS:
        if there and spec.load_format == "auto":
            raise SpecError(
                f"{spec.model} is a GPTQ checkpoint", ways=[{"method": "gptq-lora"}, {"load_format": "dummy"}]
            )
        return None
    if not there or spec.load_format == "dummy":
        assert spec.bits != 16  # `spec.checked` refuses it
        return Gptq(shape=Shape(spec.bits, spec.quant.group_size))
    assert isinstance(stored, Mapping)
    found = from_config(stored, name=spec.model)
    if found.shape.bits != spec.bits:
        raise SpecError(
            f"{spec.model} has {found.shape.bits} bits; this run wants {spec.bits}",
            ways=[{"bits": found.shape.bits}],
        )
    if spec.quant.group_size not in (found.shape.group_size, Quant().group_size):
        raise SpecError(
            f"{spec.model} has a group size of {found.shape.group_size}; this run wants {spec.quant.group_size}",
            ways=[{"quant.group_size": Quant().group_size}],
        )
    return found


def usual_format(*, sym: bool, widths: Collection[int]) -> Literal["gptq", "gptq_v2"]:
    """What a checkpoint is written in unless one says otherwise: v1 where all readers agree, else v2.

    v1 holds no zero of 0; at 3 bits and in mixed widths its readers' arithmetic differs (docs/decisions.md).
    """
    return "gptq" if sym and len(widths) == 1 and 3 not in widths else "gptq_v2"


def method_of(config: Mapping[str, Any]) -> str | None:
    """Name of the quantization in a `quantization_config` or `quantize_config.json`; None if it has none."""
    return config.get("quant_method") or config.get("method")


def from_config(config: Mapping[str, Any], *, name: str) -> Gptq:
    """Read the content of a `quantize_config.json`, or a `quantization_config`.

    Raises ModelError naming the key where it is no GPTQ, or one that qdist does not read.
    """
    method = method_of(config) or "gptq"
    if method not in METHODS:
        raise ModelError(f"{name} is quantized with {method!r}, not gptq", try_="--method qlora on a 16-bit model")
    stored: Any = config.get("checkpoint_format") or config.get("format") or "gptq"
    if method == SHIFTED:
        stored = stored.removesuffix(_PLUS_OFFSET)
    if stored not in FORMATS:
        raise ModelError(f"{name} is stored in the format {stored!r}", try_="a checkpoint in gptq or gptq_v2")
    if config.get("lm_head"):
        raise ModelError(f"{name}: its lm_head is quantized, which qdist does not load", try_="one with lm_head false")
    if config.get("pack_dtype", "int32") != "int32":
        raise ModelError(f"{name}: pack_dtype is {config['pack_dtype']!r}", try_="a checkpoint packed in int32")
    shape = _shape(config, name)
    overrides = tuple(
        _override(pattern, change, shape, name) for pattern, change in (config.get("dynamic") or {}).items()
    )
    return Gptq(
        shape=shape,
        sym=_flag(config, "sym", default=True, name=name),
        desc_act=_flag(config, "desc_act", default=False, name=name),
        format=stored,
        overrides=overrides,
        offset=_weight_offset(config, name) if method == SHIFTED else None,
    )


def stated_by(config: Mapping[str, Any], beside: Mapping[str, Any] | None, *, name: str) -> Gptq | None:
    """What config.json, or `quantize_config.json` where that says nothing, says of GPTQ; None for other models.

    beside: the content of `quantize_config.json`; None where there is none.
    Raises ModelError where the two contradict each other.
    """
    own = config.get("quantization_config")
    if own is not None and not isinstance(own, Mapping):
        raise ModelError(
            f"{name}: quantization_config is not an object in config.json", try_="download the model again"
        )
    found = from_config(own, name=name) if own and method_of(own) in METHODS else None
    if beside is None or (own and found is None):
        return found
    other = from_config(beside, name=f"{name}/quantize_config.json")
    if found and (found.shape, found.format) != (other.shape, other.format):
        raise ModelError(
            f"{name}: config.json says {found} in the format {found.format}, and quantize_config.json {other} in "
            f"{other.format}",
            try_="the checkpoint's own pair of files",
        )
    return found or other


def to_config(gptq: Gptq) -> dict[str, Any]:
    """The configuration as both libraries write it, for `quantize_config.json` and for config.json."""
    written = gptq.format + (_PLUS_OFFSET if gptq.offset else "")
    config: dict[str, Any] = {
        **({"method": SHIFTED} if gptq.offset else {"quant_method": "gptq"}),
        "bits": gptq.shape.bits,
        "group_size": gptq.shape.group_size,
        "sym": gptq.sym,
        "desc_act": gptq.desc_act,
        "lm_head": False,
        "format": written,
        "checkpoint_format": written,
        "pack_dtype": "int32",
    }
    if gptq.overrides:
        config["dynamic"] = {
            ("-:" if e.shape is None else "+:") + e.pattern: (
                {} if e.shape is None else {"bits": e.shape.bits, "group_size": e.shape.group_size}
            )
            for e in gptq.overrides
        }
    if gptq.offset:
        config["weight_offset"] = msgspec.to_builtins(gptq.offset)
    return config


def _weight_offset(config: Mapping[str, Any], name: str) -> WeightOffset:
    try:
        return msgspec.convert(config.get("weight_offset"), WeightOffset, strict=False)
    except msgspec.ValidationError as error:
        raise ModelError(f"{name}: weight_offset: {error}", try_="the configuration that qdist merge wrote") from None


def _shape(config: Mapping[str, Any], name: str, base: Shape | None = None) -> Shape:
    bits = config.get("bits", base.bits if base else None)
    size = config.get("group_size", base.group_size if base else -1)
    if bits not in BITS or isinstance(bits, bool):
        raise ModelError(f"{name}: bits is {bits!r}; GPTQ has 2, 3, 4 or 8", try_=_OWN)
    if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or size > 0):
        raise ModelError(f"{name}: group_size is {size!r}; it is -1 or a positive number", try_=_OWN)
    return Shape(bits, size)


def _override(pattern: str, change: Mapping[str, Any], base: Shape, name: str) -> Override:
    """GPTQModel's: '-:' before a pattern leaves alone what it matches, '+:' or nothing changes it."""
    bare = pattern.removeprefix("-:").removeprefix("+:")
    try:
        re.compile(bare)
    except re.error as error:
        raise ModelError(
            f"{name}: dynamic has {pattern!r}, which is not a regular expression: {error}", try_=_OWN
        ) from None
    if pattern.startswith("-:"):
        return Override(bare, None)
    return Override(bare, _shape(change, f"{name}: dynamic {pattern!r}", base))


def _flag(config: Mapping[str, Any], key: str, *, default: bool, name: str) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{name}: {key} is {value!r}; it is true or false", try_=_OWN)
    return value
