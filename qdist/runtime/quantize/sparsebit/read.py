"""Reads the packed checkpoints of Sparsebit's alpaca-qlora: their layout and meaning.

Sources, all in github.com/megvii-research/Sparsebit under large_language_models/:

llama/quantization/convert.py writes a torch file of `model` (a state dict), `layers_bit` (module path -> 2, 3 or 4) and
`hyper_parameters`: {"groupsize": ...} since a6a4be2, the whole argparse.Namespace before (01d22fa). It never reorders
inputs by activation.
llama/quantization/utils/quant.py packs `qweight`, int32 [words, out], along the inputs with the lowest bits first,
which is GPTQ's order at 2, 3 and 4 bits. `scales` and `zeros` are float32 [out, 1], or [out, groups, 1] where there is
more than one group; `zeros` holds zero x scale, so that w = q x scale - zeros. Every linear gets a `bias`, mostly of
zeros.
alpaca-qlora/convert_pack32topack8.py cuts each row of words into four rows of their bytes, the lowest first: at 4 bits
byte row r holds input 2r in its low half and 2r + 1 in its high half.

Names are those of transformers before its Llama was released (zphang/transformers, branch llama_push, 6a17e7f3b4, as
llama/quantization/README.md says): `model.decoder.layers.0.self_attn.q_proj`, `.feed_forward.w1`, `.attention_norm`,
`.ffn_norm`. alpaca-qlora/utils.py renames w1, w2, w3 to gate, down, up and took `.decoder` off until d9d0b29; from
5d22532 on it expects files without.

Rotary positions: that same file loads the checkpoint into transformers' LlamaForCausalLM by renaming alone, so the rows
of q_proj and k_proj already lie in halves, as transformers has them, and are left as they are. Meta's own names
(`attention.wq`, `attention.wk`) occur in none of Sparsebit's files. Where they do occur the rows are Meta's, in pairs
(huggingface/transformers, models/llama/convert_llama_weights_to_hf.py reorders exactly those two), and are reordered
here: a reordering of outputs moves columns of words, scales and zeros and changes no number.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import WORD
from qdist.host.opening import told
from qdist.runtime.kernels.gptq_bits import period

Width = Literal[2, 3, 4]
_WIDTHS = (2, 3, 4)
_PARTS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTSIDE = {
    "tok_embeddings": "model.embed_tokens", "embed_tokens": "model.embed_tokens",
    "norm": "model.norm", "output": "lm_head", "lm_head": "lm_head",
}  # fmt: skip
_IN_PAIRS = ("attention.wq", "attention.wk")
_DERIVED = ("inv_freq", "freqs", "freqs_cis", "backward_ic_scales", "backward_ic_zeros")
"""Buffers that a model computes itself: rotary tables, and alpaca-qlora's for its backward pass."""
_BYTES = (torch.int8, torch.uint8)
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOREIGN = "a file that Sparsebit's llama/quantization/convert.py or alpaca-qlora's convert_pack32topack8.py wrote"
_WHOLE = "copy or download it again"
_TOLERANCE, _MOST_TOLERANCE = 0.01, 0.25


class Linear(NamedTuple):
    """One quantized linear as stored, with `outputs` x `inputs` weights."""

    name: str
    """Its module path in the file."""
    packed: torch.Tensor
    """int32 [words, out], or bytes [4 x words, out]."""
    scales: torch.Tensor
    """[out, groups]."""
    zeros: torch.Tensor
    """[out, groups], zero x scale."""
    bits: Width
    in_pairs: bool
    """Whether rows are in the order of Meta's rotary positions; see `halves`."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        width = 8 * self.packed.dtype.itemsize
        return self.scales.shape[0], self.packed.shape[0] * width // self.bits


class Checkpoint(NamedTuple):
    """A checkpoint under the names of transformers' Llama. Tensors may be memory-mapped."""

    linears: dict[str, Linear]
    """Quantized linears by module path."""
    plain: dict[str, torch.Tensor]
    """Unquantized tensors by name, without biases."""
    biases: dict[str, torch.Tensor]
    """Biases by module path."""
    in_pairs: frozenset[str]
    """Module paths of plain weights in Meta's row order."""
    group_size: int
    dropped: tuple[str, ...]
    """Names in the file of buffers that a model computes itself."""

    @property
    def layers(self) -> int:
        paths = (*self.linears, *self.plain)
        return len({found[1] for path in paths if (found := re.match(r"model\.layers\.(\d+)\.", path))})

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Shape of a module's weight; None if the checkpoint has no such weight."""
        if path in self.linears:
            return self.linears[path].shape
        weight = self.plain.get(f"{path}.weight")
        return None if weight is None else tuple(weight.shape)


def read(file: Path) -> Checkpoint:
    """A checkpoint, checked for consistency.

    Raises ModelError for a file that is missing, cut off, of another kind or holds code, naming the tensor and its
    shape where one is wrong.
    """
    content = _load(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ModelError(f"{file} has no state dict under 'model'", try_=_FOREIGN)
    if not isinstance(content.get("layers_bit"), dict):
        raise ModelError(f"{file} does not say under 'layers_bit' which layers are quantized", try_=_FOREIGN)
    group_size = _group_size(content.get("hyper_parameters"), file)
    widths: dict[str, Width] = {_renamed(str(path)): bits for path, bits in content["layers_bit"].items()}
    for path, bits in widths.items():
        if bits not in _WIDTHS or isinstance(bits, bool):
            raise ModelError(f"{file}: layers_bit gives {path} {bits!r} bits; Sparsebit packs 2, 3 or 4")
    return _sorted(content["model"], widths, group_size, file)


def words(linear: Linear) -> torch.Tensor:
    """int32 [words, out] as GPTQ files have it. Four bytes in a column are a word (little-endian, as torch is)."""
    if linear.packed.dtype == torch.int32:
        return linear.packed
    rows, outputs = linear.packed.shape
    parts = linear.packed.reshape(rows // 4, 4, outputs).transpose(1, 2).contiguous()
    return parts.view(torch.int32).squeeze(-1)


class Zeros(NamedTuple):
    """The integer zeros of one linear."""

    values: torch.Tensor
    """int8 [groups, out]."""
    residual: float
    """Largest distance of stored zero / scale from an integer that rounding cannot explain, or 0."""


def integer_zeros(linear: Linear) -> Zeros:
    """The integer zeros: stored zeros divided by their scales.

    Two numbers, each rounded to a type whose neighbours lie eps apart, give zero / scale up to zero x eps wrong; below
    the smallest normal number the absolute rounding of both counts. Float32 is granted float16's eps, for it may have
    been float16 before: at 4 bits that is 0.016. Numbers that are no integers at all lie 0.5 off somewhere.

    Raises ModelError for scales or zeros that are no numbers, or scales that are not positive.
    """
    scales, zeros = linear.scales.double(), linear.zeros.double()
    if not bool(torch.isfinite(scales).all() and torch.isfinite(zeros).all() and (scales > 0).all()):
        raise ModelError(f"{linear.name}: scales must be positive, and scales and zeros finite", try_=_WHOLE)
    ratio = zeros / scales
    nearest = ratio.round()
    limits = [torch.finfo(kind) for kind in (linear.scales.dtype, linear.zeros.dtype)]
    eps = max(torch.finfo(torch.float16).eps, *(limit.eps for limit in limits))
    smallest = max(limit.smallest_normal * limit.eps for limit in limits)
    explained = nearest.abs() * eps + (nearest.abs() + 1) * smallest / (2 * scales)
    off = (ratio - nearest).abs()
    beyond = off[off > explained.clamp(_TOLERANCE, _MOST_TOLERANCE)]
    values = nearest.clamp(-128, 127).to(torch.int8).t().contiguous()
    return Zeros(values, float(beyond.max()) if beyond.numel() else 0.0)


def halves(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: where each row of a query or key weight in transformers' order lies in Meta's.

    Meta turns rows 2i and 2i + 1 of a head together, transformers rows i and i + half a head.
    """
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)


def _load(file: Path) -> Any:
    """The content of a torch file, without executing any of it; memory-mapped if its format allows."""
    if not file.is_file():
        raise ModelError(f"no file {file}", try_="the path of a .pt, .pth, .pth.tar or .bin file")
    with open(file, "rb") as handle:
        start = handle.read(4)
    mapped = zipfile.is_zipfile(file)
    if start[:2] == b"PK" and not mapped:
        raise ModelError(f"{file} is cut off: it ends before its table of contents", try_=_WHOLE)
    if not mapped and start[:1] != b"\x80":
        raise ModelError(f"{file} was not written by torch.save", try_=_FOREIGN)
    try:
        # A namespace is plain values with another name; older files hold their command line in one.
        with (
            told(f"{file} cannot be read", ModelError, try_=_WHOLE),
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore", UserWarning)  # a pickle protocol that torch.save does not use
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except ModelError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        found = re.search(r"GLOBAL:? ([\w.]+)", str(error.__cause__))
        named = f" ({found[1]})" if found else ""
        raise ModelError(
            f"{file} holds more than tensors and plain values{named}; it was not loaded, for that could run code",
            try_="a checkpoint from someone you trust, loaded and saved again as tensors",
        ) from None


def _group_size(given: object, file: Path) -> int:
    stated = vars(given) if isinstance(given, argparse.Namespace) else given
    size = stated.get("groupsize") if isinstance(stated, Mapping) else None
    if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or size > 0):
        raise ModelError(f"{file}: hyper_parameters give groupsize {size!r}; it is -1 or a positive number")
    return size


def _old_part(path: str) -> str:
    """A module path without its model's prefixes: `layers.0.attention.wq`."""
    return path.removeprefix("model.").removeprefix("decoder.")


def _renamed(path: str) -> str:
    """A module path of the file in transformers' Llama naming."""
    bare = _old_part(path)
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)", bare)
    if inside:
        return f"model.layers.{inside[1]}.{_PARTS.get(inside[2], inside[2])}"
    return _OUTSIDE.get(bare, bare)


def _sorted(state: Mapping[Any, Any], widths: Mapping[str, Width], group_size: int, file: Path) -> Checkpoint:
    """Separate linears, biases, plain tensors and derived buffers."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    origins: dict[str, str] = {}
    dropped = []
    for name, value in state.items():
        path, leaf = _stored_name(name, value, file)
        if leaf in _DERIVED:
            dropped.append(name)
            continue
        if leaf != "qweight" and value.dtype not in _PLAIN:
            stored = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ModelError(f"{name} is {stored}; only qweight is of integers")
        module = _renamed(path)
        if origins.setdefault(module, path) != path:
            raise ModelError(f"{file} holds {module} twice, as {origins[module]} and as {path}")
        modules.setdefault(module, {})[leaf] = value
    absent = sorted(path for path in widths if "qweight" not in modules.get(path, {}))
    if absent:
        raise ModelError(f"{file} lacks {absent[0]}.qweight, which layers_bit lists", try_=_WHOLE)
    found = Checkpoint({}, {}, {}, frozenset(), group_size, tuple(dropped))
    in_pairs, turned = set(), any(_transposed(leaves) for leaves in modules.values())
    for module, leaves in modules.items():
        if "bias" in leaves:
            found.biases[module] = leaves.pop("bias")
        pairs = _old_part(origins[module]).endswith(_IN_PAIRS)
        if "qweight" in leaves:
            if module not in widths:
                raise ModelError(f"{file} holds {origins[module]}.qweight, which layers_bit does not list")
            found.linears[module] = _linear(
                origins[module], leaves, widths[module], group_size, in_pairs=pairs, transposed=turned
            )
            continue
        if pairs:
            in_pairs.add(module)
        found.plain.update({f"{module}.{leaf}".lstrip("."): value for leaf, value in leaves.items()})
    return found._replace(in_pairs=frozenset(in_pairs))


def _stored_name(name: object, value: object, file: Path) -> tuple[str, str]:
    """(module path, leaf) of an entry of a state dict. Raises ModelError unless it is a tensor with its own values."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ModelError(f"{file}: {name!r} is {type(value).__name__}, not a tensor", try_=_FOREIGN)
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise ModelError(f"{file}: {name} has no values of its own, it is {value.layout} on {value.device}")
    path, _, leaf = name.rpartition(".")
    return path, leaf


def _transposed(leaves: Mapping[str, torch.Tensor]) -> bool:
    """Whether bytes are laid out as [out, bytes], which a square matrix does not tell."""
    packed, scales = leaves.get("qweight"), leaves.get("scales")
    if packed is None or scales is None or packed.dtype not in _BYTES or packed.dim() != 2 or not scales.dim():
        return False
    return packed.shape[1] != scales.shape[0] == packed.shape[0]


def _linear(
    name: str, leaves: Mapping[str, torch.Tensor], bits: Width, group_size: int, *, in_pairs: bool, transposed: bool
) -> Linear:
    """Check the shapes of a quantized linear against each other.

    transposed: whether other linears of the file are.
    """
    unknown, missing = sorted(set(leaves) - {"qweight", "scales", "zeros"}), {"scales", "zeros"} - set(leaves)
    if missing or unknown:
        raise ModelError(f"{name} lacks {min(missing)}" if missing else f"{name} has {unknown[0]}, which is not known")
    packed, scales, zeros = leaves["qweight"], leaves["scales"], leaves["zeros"]
    if scales.dim() not in (2, 3) or scales.shape[-1] != 1 or not scales.numel():
        raise ModelError(f"{name}.scales has shape {list(scales.shape)}; it is [out, 1] or [out, groups, 1]")
    if zeros.shape != scales.shape:
        raise ModelError(f"{name}.zeros has shape {list(zeros.shape)}, its scales {list(scales.shape)}")
    outputs, groups = scales.shape[0], scales.shape[1]
    if packed.dtype not in (torch.int32, *_BYTES):
        raise ModelError(f"{name}.qweight is {str(packed.dtype).removeprefix('torch.')}, not int32 or int8")
    if _transposed(leaves) or (transposed and packed.dtype in _BYTES and tuple(packed.shape) == (outputs, outputs)):
        packed = packed.t()
    rows = period(bits)[1] * (1 if packed.dtype == torch.int32 else WORD // 8)
    if packed.dim() != 2 or packed.shape[1] != outputs or not packed.shape[0] or packed.shape[0] % rows:
        wanted = f"[a multiple of {rows}, {outputs}] at {bits} bits and scales of {list(scales.shape)}"
        raise ModelError(f"{name}.qweight has shape {list(leaves['qweight'].shape)}; it is {wanted}", try_=_WHOLE)
    linear = Linear(name, packed, scales.reshape(outputs, groups), zeros.reshape(outputs, groups), bits, in_pairs)
    inputs = linear.shape[1]
    if groups != (1 if group_size == -1 else -(-inputs // group_size)):
        raise ModelError(
            f"{name}.scales has shape {list(scales.shape)}, which is {groups} groups of {inputs} inputs; "
            f"hyper_parameters say groupsize {group_size}"
        )
    return linear
