"""Which tensors a GGUF file has: names, types and row orders for Llama, Mistral, Qwen2 and Qwen3."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gguf

from qdist.core.errors import ModelError
from qdist.core.model.shapes import Linear, ModelFacts, from_config
from qdist.runtime.exports.gguf.blocks import BLOCK, Kind, Make, Stored, Type
from qdist.runtime.exports.gguf.metadata import Rope, rope_factors

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_REMADE = "rotary_emb.inv_freq"
"""Ends the names of tables that old checkpoints carry and every reader makes anew."""
Tensors = Mapping[str, tuple[tuple[int, ...], Make]]


def facts_of(config: Mapping[str, Any], *, name: str) -> ModelFacts:
    """The model's facts. Raises ModelError for a family or a variant that GGUF readers would compute otherwise."""
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"{name} is of the family {family!r}; GGUF is written for {known}", try_="a merged folder")
    facts = from_config(config, name=name)
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ModelError(f"{name} has hidden_act {activation!r}, and GGUF readers compute silu", try_="a merged folder")
    (shape,) = facts.shapes  # these architectures have layers of one kind
    width = shape.heads * shape.head_dim
    if facts.family == "qwen2" and width != facts.hidden:
        raise ModelError(
            f"{name} has heads of {width} in all, and llama.cpp reads Qwen2 with {facts.hidden} like its hidden size",
            try_="a merged folder",
        )
    if facts.family == "qwen3" and any(linear.bias for linear in shape.linears):
        raise ModelError(f"{name} has attention_bias, and llama.cpp reads Qwen3 without", try_="a merged folder")
    return facts


def architecture_of(facts: ModelFacts) -> str:
    """general.architecture: llama, qwen2 or qwen3."""
    return str(gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[facts.family]])


def stored_tensors(tensors: Tensors, facts: ModelFacts, rope: Rope, kind: Kind) -> tuple[Stored, ...]:
    """Every tensor of the file, in the order of `tensors`.

    A tied model has no output.weight: its lm_head, where `tensors` has one, is the embedding by definition.
    Raises ModelError for tensors that are missing, unknown or of another shape than the configuration says.
    """
    expected = dict(_expected(facts))
    given = {
        name: entry
        for name, entry in tensors.items()
        if not name.endswith(_REMADE) and not (name == _HEAD and facts.tied_embeddings)
    }
    _require_same(expected, given, facts.name)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[facts.family], facts.layer_count)
    factors = rope_factors(rope, facts.shapes[0].head_dim)
    stored = [
        Stored(
            name=names.get_name(source, try_suffixes=(".weight", ".bias")),
            source=source,
            shape=shape,
            type=_type(source, shape, kind),
            heads=_interleaved_heads(source, facts),
            make=make,
        )
        for source, (shape, make) in given.items()
    ]
    if factors is not None:
        table = partial(type(factors).clone, factors)
        stored.insert(0, Stored("rope_freqs.weight", "rope scaling", tuple(factors.shape), Type.F32, 0, table))
    return tuple(stored)


def _expected(facts: ModelFacts) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield _EMBEDDING, (facts.vocab, facts.hidden)
    for layer, run in enumerate(facts.run_of_layer):
        before, shape = f"model.layers.{layer}", facts.shapes[run]
        for linear in shape.linears:
            module = f"{before}.{_block(linear)}.{linear.name}"
            yield f"{module}.weight", (linear.outputs, linear.inputs)
            if linear.bias:
                yield f"{module}.bias", (linear.outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{before}.{norm}.weight", (facts.hidden,)
        if shape.qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield f"{before}.self_attn.{norm}.weight", (shape.head_dim,)
    yield _NORM, (facts.hidden,)
    if not facts.tied_embeddings:
        yield _HEAD, (facts.vocab, facts.hidden)


def _block(linear: Linear) -> str:
    return "self_attn" if linear.reads.startswith("attention") else "mlp"


def _require_same(expected: Mapping[str, tuple[int, ...]], given: Tensors, name: str) -> None:
    missing = [source for source in expected if source not in given]
    if missing:
        raise ModelError(f"{name} lacks {_first(missing)}", try_="the whole merged model")
    unknown = [source for source in given if source not in expected]
    if unknown:
        raise ModelError(f"{name} has {_first(unknown)}, which GGUF has no place for", try_="a merged folder")
    for source, shape in expected.items():
        if given[source][0] != shape:
            raise ModelError(
                f"{source} has shape {list(given[source][0])}, and the configuration of {name} says {list(shape)}",
                try_="the config.json that was saved with these weights",
            )


def _first(sources: list[str]) -> str:
    return f"{sources[0]} and {len(sources) - 1} more" if len(sources) > 1 else sources[0]


def _type(source: str, shape: tuple[int, ...], kind: Kind) -> Any:
    """Vectors are float32; of matrices, a file's kind takes those it can hold, fp16 the rest."""
    if len(shape) == 1:
        return Type.F32
    if kind == "q8_0" and shape[1] % BLOCK == 0:
        return Type.Q8_0
    if kind == "q4_1" and source not in (_EMBEDDING, _HEAD):
        if shape[1] % BLOCK:
            raise ModelError(f"{source} has {shape[1]} inputs, and Q4_1 takes them {BLOCK} at a time", try_="f16")
        return Type.Q4_1
    return Type.F16


def _interleaved_heads(source: str, facts: ModelFacts) -> int:
    """Heads of q_proj and k_proj of the architecture llama; Qwen's are rotated as transformers rotates them."""
    if _ARCHITECTURES[facts.family] != gguf.MODEL_ARCH.LLAMA:
        return 0
    module = source.rsplit(".", 2)[-2]
    shape = facts.shapes[0]
    return {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(module, 0)
