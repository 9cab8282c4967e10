"""What qdist knows about a model family, and parts shared by several families."""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

from qdist.core.model.config import Keys
from qdist.core.model.families.layers import attention_linears, mlp_linears
from qdist.core.model.shapes import Kept, LayerRun, LayerShape, Linear, ModelFacts, Modules

Config = dict[str, Any]
"""The content of a config.json."""


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model that has a short name."""

    hub_id: str
    """`owner/name` on the Hugging Face Hub; empty when the weights come from elsewhere."""
    config: Config
    tuned: dict[str, Config] = {}
    """Words in the names of models derived from this one with the same shape, such as 'instruct', and what their
    config.json has otherwise."""
    also: tuple[str, ...] = ()
    """Names of other models of exactly this shape, without their owners."""


WRAPPED = Modules(
    embedding="model.language_model.embed_tokens",
    shared=("model.language_model.rotary_emb",),
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
)
"""Where a Llama-like decoder lies in a model of images and text."""

_HEADER_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


class Gguf(NamedTuple):
    """How llama.cpp represents a family of Llama-like layers."""

    architecture: str
    """`general.architecture` of the files written."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """transformers' names of a layer's norms over the hidden size."""
    interleaved: bool = False
    """Whether queries and keys are rotated in neighbouring pairs, so that their rows are reordered."""
    windowed: bool = False
    """Whether config.json's `sliding_window` applies regardless of `use_sliding_window`."""
    refusal: Callable[[ModelFacts], str] = lambda _: ""
    """Why llama.cpp would compute a variant differently, worded to follow its name; empty if it would not."""
    header_keys: dict[str, str] = _HEADER_KEYS
    """Key of a file's header behind the architecture -> key of config.json: those that transformers converts.
    Empty where transformers does not convert the architecture, so that files are written and not read."""


HEADER_KEYS_WITH_HEADS = _HEADER_KEYS | {"rope.dimension_count": "head_dim"}


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """All that qdist knows about the models of one `model_type`."""

    model_type: str
    read: Callable[[Keys], ModelFacts]
    """The facts of a config.json. Keys that may be absent take transformers' defaults."""
    modules: Modules = Modules()
    measured: bool = True
    """Whether what its layers keep for the backward pass was measured; otherwise a plan has a margin."""
    experts_together: bool = False
    """Whether vLLM's class says `is_3d_moe_weight`: it reads adapters of experts in PEFT's layout."""
    own_code: bool = False
    """Only code in the models' own repositories computes it: run only where `trust_remote_code` is set."""
    gguf: Gguf | None = None
    """GGUF representation; None if GGUF is neither written nor read."""
    aliases: dict[str, Alias] = {}
    """Known models of the family by their short names."""


def decoder_config(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int,
    positions: int,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    bos: int | None = 1,
    eos: int | list[int] = 2,
    tied: bool = False,
    **more: Any,
) -> Config:
    """The keys that the configs of Llama-like models share."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **more,
    }


def read_facts(
    keys: Keys,
    linears: tuple[Linear, ...],
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    max_positions: int | None = None,
    tied: bool = False,
    outer_norms: int = 1,
    learned_positions: int = 0,
    **own: Any,
) -> ModelFacts:
    """The keys that all families share, in the spellings they have; `own` are fields of layers that are no Llama's.

    intermediate: width of the MLP where that is not among the linears.
    """
    hidden, heads = keys.count("hidden_size", "n_embed", "n_embd"), keys.count("num_attention_heads", "n_head")
    if head_dim is None:
        keys.divides("num_attention_heads", heads, "hidden_size", hidden)
    keys.divides("num_key_value_heads", kv_heads or heads, "num_attention_heads", heads)
    shape = LayerShape(
        hidden=hidden,
        linears=linears,
        intermediate=intermediate or next(linear.inputs for linear in linears if linear.reads == "mlp_out"),
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        **own,
    )
    return read_model(
        keys,
        (LayerRun(shape, count_layers(keys)),),
        max_positions=max_positions,
        tied=tied,
        outer_norms=outer_norms,
        learned_positions=learned_positions,
    )


def count_layers(keys: Keys) -> int:
    """Number of decoder layers."""
    return keys.count("num_hidden_layers", "n_layer", most=10_000)


def read_model(
    keys: Keys, layers: tuple[LayerRun, ...], *, max_positions: int | None = None, tied: bool = False, **own: Any
) -> ModelFacts:
    """What all families state outside their layers; `own` are fields of models that are no Llama's.

    max_positions, tied: where the config does not say.
    """
    positions = ("max_position_embeddings", "model_max_length", "seq_length", "n_positions")
    return ModelFacts(
        name=keys.name,
        family=keys.text("model_type"),
        layers=layers,
        vocab=keys.count("vocab_size"),
        max_positions=keys.count(*positions, default=max_positions),
        tied_embeddings=keys.flag("tie_word_embeddings", default=tied),
        **own,
    )


def read_wrapped(
    keys: Keys, read: Callable[[Keys], ModelFacts], left_out: tuple[Kept, ...], *, tied: bool = False
) -> ModelFacts:
    """Facts of the decoder of a model of images and text. tied: where the outer config does not say."""
    return structs.replace(
        read(keys.inner("text_config")),
        family=keys.text("model_type"),
        tied_embeddings=keys.flag("tie_word_embeddings", default=tied),
        left_out=left_out,
    )


def read_grouped(
    keys: Keys,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    head_dim: int | None = None,
    fused_gate: bool = False,
    gated: bool = True,
    **own: Any,
) -> ModelFacts:
    """Facts of a model with Llama's layer: RMS norms, grouped queries, a gated MLP.

    bias: of queries, keys and values. out_bias: of their output, None for the same.
    head_dim: where the config does not state one; None for hidden / heads.
    fused_gate: gate and up are one linear. gated: whether there is a gate.
    """
    hidden, inner, heads = (keys.count(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads = keys.count("num_key_value_heads", default=heads)
    if not (head_dim or keys.states("head_dim")):
        keys.divides("num_attention_heads", heads, "hidden_size", hidden)
    head_dim = keys.count("head_dim", default=head_dim or hidden // heads)
    linears = (
        *attention_linears(hidden, heads, kv_heads, head_dim, bias=bias, out_bias=out_bias),
        *mlp_linears(hidden, inner, bias=mlp_bias, fused=fused_gate, gated=gated),
    )
    return read_facts(keys, linears, head_dim=head_dim, kv_heads=kv_heads, **own)


def fused_linears(hidden: int, inner: int, attention_bias: bool) -> tuple[Linear, ...]:
    """The linears of BLOOM and GPT-NeoX: queries, keys and values in one."""
    return (
        Linear("query_key_value", hidden, 3 * hidden, attention_bias, "attention_in"),
        Linear("dense", hidden, hidden, attention_bias, "attention_out"),
        Linear("dense_h_to_4h", hidden, inner, True, "mlp_in"),
        Linear("dense_4h_to_h", inner, hidden, True, "mlp_out"),
    )
