"""The tensors of a GGUF file: names, types and row orders, for the families that have llama.cpp's names."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gguf

from qdist.core.errors import ModelError
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.shapes import Linear, ModelFacts
from qdist.runtime.exports.gguf.blocks import BLOCK, Kind, Make, Stored, Type
from qdist.runtime.exports.gguf.metadata import Rope, gguf_of, rope_factors
from qdist.runtime.exports.gguf.quantizer import MIXTURES, Place, mixed_type

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_REMADE = "rotary_emb.inv_freq"
"""Suffix of tables that old checkpoints contain and every reader recomputes."""
Tensors = Mapping[str, tuple[tuple[int, ...], Make]]


def facts_of(config: Mapping[str, Any], *, name: str) -> ModelFacts:
    """The model's facts. Raises ModelError for a family or variant that GGUF readers would compute differently."""
    family = str(config.get("model_type"))
    known = [key for key, own in FAMILIES.items() if own.gguf]
    if family not in known:
        raise ModelError(
            f"{name} is of the family {family!r}; GGUF is written for {', '.join(known)}", try_="a merged folder"
        )
    facts = from_config(config, name=name)
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ModelError(f"{name} has hidden_act {activation!r}, and GGUF readers compute silu", try_="a merged folder")
    refusal = gguf_of(facts).refusal(facts)
    if refusal:
        raise ModelError(f"{name} {refusal}", try_="a merged folder")
    return facts


def _architecture(facts: ModelFacts) -> gguf.MODEL_ARCH:
    wanted = gguf_of(facts).architecture
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)


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
    names = gguf.get_tensor_name_map(_architecture(facts), facts.layer_count)
    factors = rope_factors(rope, facts.shapes[0].head_dim)
    stored = list[Stored]()
    for source, (shape, make) in given.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        heads = _interleaved_heads(source, facts)
        stored.append(Stored(name, source, shape, _type(source, _place(name, facts), shape, kind), heads, make))
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
        for norm in gguf_of(facts).norms:
            yield f"{before}.{norm}.weight", (facts.hidden,)
        for norm, width in zip(("q_norm", "k_norm"), shape.qk_norm_widths, strict=False):
            yield f"{before}.self_attn.{norm}.weight", (width,)
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


def _place(name: str, facts: ModelFacts) -> Place:
    """Where in the model a tensor of the file is."""
    *_, layer, part, _ = ("0", *name.split("."))
    shape = facts.shapes[0]
    number = int(layer) if layer.isdecimal() else 0
    return Place(part, number, facts.layer_count, shape.heads // shape.kv_heads, facts.tied_embeddings)


def _type(source: str, place: Place, shape: tuple[int, ...], kind: Kind) -> Any:
    """float32 for vectors; for matrices what the file's kind has for them if it can hold them, else fp16."""
    if len(shape) == 1:
        return Type.F32
    if kind in MIXTURES:
        return mixed_type(kind, place, shape[1])
    if kind == "q8_0" and shape[1] % BLOCK == 0:
        return Type.Q8_0
    if kind == "q4_1" and source not in (_EMBEDDING, _HEAD):
        if shape[1] % BLOCK:
            raise ModelError(f"{source} has {shape[1]} inputs, and Q4_1 takes them {BLOCK} at a time", try_="f16")
        return Type.Q4_1
    return Type.F16


def _interleaved_heads(source: str, facts: ModelFacts) -> int:
    """Heads of q_proj and k_proj if llama.cpp rotates neighbouring pairs, unlike transformers; 0 for other tensors."""
    if not gguf_of(facts).interleaved:
        return 0
    module = source.rsplit(".", 2)[-2]
    shape = facts.shapes[0]
    return {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(module, 0)
