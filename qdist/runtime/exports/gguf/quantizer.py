"""llama.cpp's mixtures of types, such as q4_k_m, and its own rounding to them, by the library in xllamacpp.

A mixture gives most matrices one type and more bits to those where rounding costs most: the head, and attention's
values and the MLP's last linear in some layers. The rules are those of llama.cpp's `llama-quantize` for dense models.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np

from qdist.core.errors import MachineError

Type = gguf.GGMLQuantizationType
_INSTEAD = {
    Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0, Type.IQ4_XS: Type.IQ4_NL,
}  # fmt: skip
"""What holds rows that are no multiple of 256, in blocks of 32."""


class Place(NamedTuple):
    """A matrix in a model."""

    part: str
    """Its name without layer, such as `attn_v`, `output` or `token_embd`."""
    layer: int
    layers: int
    shared: int
    """Query heads to a key-value head."""
    tied: bool = False
    """Whether the embedding is the head, too."""


Rule = Callable[[Place], Any]
"""The type of a matrix that has another than most; None for the usual one."""


class Mixture(NamedTuple):
    """What a file of a type holds."""

    usual: Any
    file: Any
    """A `gguf.LlamaFileType`."""
    other: Rule = lambda _: None


def _has_more_bits(place: Place) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def _medium(place: Place) -> Any:
    """Of q4_k_m and q5_k_m."""
    return Type.Q6_K if place.part in ("attn_v", "ffn_down") and _has_more_bits(place) else None


def _q4_k_s(place: Place) -> Any:
    low = {"attn_v": 4, "ffn_down": place.layers // 8}
    return Type.Q5_K if place.layer < low.get(place.part, 0) else None


def _q3_k_m(place: Place) -> Any:
    if place.part == "attn_output":
        return Type.Q4_K
    low = {"attn_v": 2, "ffn_down": place.layers // 16}
    if place.part not in low:
        return None
    return Type.Q5_K if place.layer < low[place.part] else Type.Q4_K


def _q3_k_l(place: Place) -> Any:
    return Type.Q5_K if place.part in ("attn_v", "attn_output", "ffn_down") else None


def _iq4(place: Place) -> Any:
    if place.part == "attn_v" and place.shared >= 4:
        return Type.Q5_K
    return Type.Q5_K if place.part == "ffn_down" and place.layer < place.layers // 8 else None


_FILE = gguf.LlamaFileType
MIXTURES = MappingProxyType({
    "q3_k_s": Mixture(Type.Q3_K, _FILE.MOSTLY_Q3_K_S),
    "q3_k_m": Mixture(Type.Q3_K, _FILE.MOSTLY_Q3_K_M, _q3_k_m),
    "q3_k_l": Mixture(Type.Q3_K, _FILE.MOSTLY_Q3_K_L, _q3_k_l),
    "iq4_xs": Mixture(Type.IQ4_XS, _FILE.MOSTLY_IQ4_XS, _iq4),
    "iq4_nl": Mixture(Type.IQ4_NL, _FILE.MOSTLY_IQ4_NL, _iq4),
    "q4_0": Mixture(Type.Q4_0, _FILE.MOSTLY_Q4_0),
    "q4_k_s": Mixture(Type.Q4_K, _FILE.MOSTLY_Q4_K_S, _q4_k_s),
    "q4_k_m": Mixture(Type.Q4_K, _FILE.MOSTLY_Q4_K_M, _medium),
    "q5_0": Mixture(Type.Q5_0, _FILE.MOSTLY_Q5_0),
    "q5_k_s": Mixture(Type.Q5_K, _FILE.MOSTLY_Q5_K_S),
    "q5_k_m": Mixture(Type.Q5_K, _FILE.MOSTLY_Q5_K_M, _medium),
    "q6_k": Mixture(Type.Q6_K, _FILE.MOSTLY_Q6_K),
})  # fmt: skip
"""Mixtures by the names that llama.cpp gives them, from the smallest."""
ROUNDED_BY_LLAMA_CPP = frozenset({Type.Q3_K, Type.Q4_0, Type.Q4_K, Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K,
                                  Type.IQ4_NL, Type.IQ4_XS})  # fmt: skip


def mixed_type(kind: str, place: Place, columns: int) -> Any:
    """The type of a matrix in a file of a mixture. columns: its row's length."""
    mixture = MIXTURES[kind]
    if place.part == "output" or (place.part == "token_embd" and place.tied):
        is_whole = columns % gguf.GGML_QUANT_SIZES[mixture.usual][0] == 0
        return _fitting(Type.Q6_K if is_whole else Type.Q8_0, columns)
    chosen = mixture.other(place) or mixture.usual
    if place.part == "attn_v" and place.layers == 80 and place.shared > 1 and chosen in (Type.Q3_K, Type.Q4_K):
        chosen = Type.Q5_K  # of a 70B: few of its heads have values
    return _fitting(chosen, columns)


def _fitting(wanted: Any, columns: int) -> Any:
    """The type, or the nearest whose blocks fill a row; F16 where none does."""
    for each in (wanted, _INSTEAD.get(wanted, Type.F16)):
        if columns % gguf.GGML_QUANT_SIZES[each][0] == 0:
            return each
    return Type.F16


def quantize(rows: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """Rows as blocks, uint8 [rows, bytes], rounded by llama.cpp.

    rows: float32 [rows, columns]. Raises MachineError without xllamacpp.
    """
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    count, columns = rows.shape
    given, blocks = np.ascontiguousarray(rows, np.float32), np.empty((count, columns // weights * size), np.uint8)
    written = quantizer()(int(kind), given.ctypes.data, blocks.ctypes.data, 0, count, columns, None)
    assert written == blocks.size
    return blocks


@cache
def quantizer() -> Any:
    """ggml_quantize_chunk(type, rows, blocks, first, count, columns, weights of errors) of the library in xllamacpp.

    Raises MachineError where it is not installed, or does not show the function.
    """
    try:
        function = ctypes.CDLL(import_module("xllamacpp.xllamacpp").__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise MachineError(
            f"llama.cpp's quantizer cannot be used: {error}", try_="pip install 'qdist[llamacpp]', or --type q8_0"
        ) from None
    number, place = ctypes.c_int64, ctypes.c_void_p
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_int, place, place, number, number, number, place]
    return function
