"""What is a model made of? Shapes read from its Hugging Face config.json, and what can be counted from them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import msgspec

from qdist.core.errors import ModelError, nearest
from qdist.core.model.config import Keys

Reads = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]
"""Which tensor of a decoder layer a linear takes as input."""
OWN_CODE = frozenset(("baichuan",))
"""Families that only code in the models' own repositories computes: transformers has no class for them."""
ALL_LINEAR = "all-linear"  # stands for every name in `linear_names`, as in peft


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear module of a decoder layer, by its leaf name in transformers."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    reads: Reads
    """Linears that read the same tensor share it when autograd keeps it."""

    @property
    def weights(self) -> int:
        """Elements of the matrix: what is quantized."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Matrix and bias."""
        return self.weights + self.outputs * self.bias


class LayerShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of one decoder layer. Counts are parameters, never bytes."""

    hidden: int
    """Width of what enters and leaves."""
    linears: tuple[Linear, ...]
    """In module order: what is quantized and adapted."""
    intermediate: int
    """Width of the MLP."""
    heads: int
    """Of queries; 0, as the next two, in a layer without attention."""
    kv_heads: int
    head_dim: int
    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    """Norms over the hidden size."""
    qk_norm: bool = False
    """Queries and keys each pass a norm over the head dimension (Qwen3)."""
    mlp: Literal["gated", "gelu", "relu"] = "gated"
    """activation(gate) * up, or the activation of up alone."""
    attention: Literal["flash", "repacked", "eager"] = "flash"
    """repacked: rotating part of a head lays queries out anew, so the output is copied before it is projected.
    eager: the model writes out its scores (ALiBi), and no flash kernel runs."""

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of the linears."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def norm_parameters(self) -> int:
        """All norms."""
        return self.norms * self.norm_width + 2 * self.head_dim * self.qk_norm

    @property
    def norm_width(self) -> int:
        """Parameters of a norm over the hidden size: a layer norm has a scale and a shift, an RMS norm a scale."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def parameters(self) -> int:
        """The whole layer."""
        return self.linear_parameters + self.norm_parameters

    @property
    def weights(self) -> int:
        """Elements of all matrices: what is quantized."""
        return sum(linear.weights for linear in self.linears)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix."""
        return max(linear.weights for linear in self.linears)

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears that `targets` names; `all-linear` names every one."""
        return tuple(linear for linear in self.linears if ALL_LINEAR in targets or linear.name in targets)


class LayerRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many decoder layers of one shape, one behind the other."""

    shape: LayerShape
    count: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a causal language model. Counts are parameters, never bytes."""

    name: str
    family: str
    """The `model_type` of the config."""
    layers: tuple[LayerRun, ...]
    """The decoder layers in order, run-length coded."""
    vocab: int
    max_positions: int
    tied_embeddings: bool
    """The output head is the input embedding: one matrix, counted once."""
    outer_norms: int = 1
    """Norms over the hidden size outside the decoder layers, of the kind that these have."""
    learned_positions: int = 0
    """Rows of a learned position table (OPT), or 0."""

    @property
    def hidden(self) -> int:
        """Width of hidden states, the same between all layers."""
        return self.layers[0].shape.hidden

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return sum(run.count for run in self.layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The shape of each run."""
        return tuple(run.shape for run in self.layers)

    @property
    def run_of_layer(self) -> tuple[int, ...]:
        """The run of each decoder layer, by its number in `layers`."""
        return tuple(index for index, run in enumerate(self.layers) for _ in range(run.count))

    def counts(self, first: int, number: int) -> tuple[int, ...]:
        """How many of so many layers from `first` on belong to each run."""
        ends = tuple(accumulate((run.count for run in self.layers), initial=0))
        return tuple(max(0, min(end, first + number) - max(start, first)) for start, end in pairwise(ends))

    def runs(self, layers: Sequence[int]) -> tuple[int, ...]:
        """How many layers, given by their numbers, belong to each run."""
        run_of_layer = self.run_of_layer if layers else ()
        found = [run_of_layer[layer] for layer in layers]
        return tuple(found.count(run) for run in range(len(self.layers)))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of every kind of decoder layer, each once. lm_head is none."""
        return tuple(dict.fromkeys(linear for shape in self.shapes for linear in shape.linears))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """What `targets` may name."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def linear_weights(self) -> int:
        """Elements of all matrices in decoder layers: what is quantized."""
        return sum(run.count * run.shape.weights for run in self.layers)

    @property
    def outer_norm_parameters(self) -> int:
        """All norms outside the decoder layers."""
        return self.outer_norms * self.layers[0].shape.norm_width

    @property
    def embedding_parameters(self) -> int:
        """The token table, the position table if learned, and the output head unless it is tied."""
        tables = 1 if self.tied_embeddings else 2
        return (tables * self.vocab + self.learned_positions) * self.hidden

    @property
    def parameters(self) -> int:
        """The whole model, a tied head counted once."""
        layers = sum(run.count * run.shape.parameters for run in self.layers)
        return layers + self.outer_norm_parameters + self.embedding_parameters

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """Every linear of every kind of layer that `targets` names, each once; `all-linear` names every one.

        Raises ModelError when a target is no linear of this model.
        """
        strangers = [] if ALL_LINEAR in targets else [name for name in targets if name not in self.linear_names]
        if strangers:
            known = ", ".join(self.linear_names)
            meant = dict.fromkeys(filter(None, (nearest(each, self.linear_names) for each in targets)))
            raise ModelError(
                f"{self.name} has no linear {strangers[0]!r} among {known}",
                ways=[{"lora.targets": tuple(meant) or (ALL_LINEAR,)}],
            )
        return tuple(dict.fromkeys(linear for shape in self.shapes for linear in shape.targeted(targets)))


def from_config(config: Mapping[str, object], *, name: str) -> ModelFacts:
    """Facts from the content of a config.json. Keys a family may omit take transformers' defaults.

    Raises ModelError when the model_type is not supported, a key is missing or its value is of the wrong kind.
    """
    keys = Keys(config, name)
    family = keys.text("model_type")
    if family not in _READERS:
        known = ", ".join(sorted(_READERS))
        own = ", and runs code out of its own repository, which qdist does not" if config.get("auto_map") else ""
        raise ModelError(f"{name} has model_type {family!r}, which qdist does not know{own}", try_=f"one of: {known}")
    return _READERS[family](keys)


def require_library_class(config: Mapping[str, object], *, name: str) -> None:
    """Raise ModelError for a model that only code out of its own repository computes. config: of its config.json."""
    if config.get("model_type") in OWN_CODE:
        raise own_code(name, "; `qdist plan` works, launch does not")


def own_code(name: str, more: str = "") -> ModelError:
    """What is said of a model whose code would have to be run: it is not."""
    return ModelError(
        f"{name} runs code out of its own repository, which qdist does not{more}",
        try_="a model that transformers has a class for, such as llama-7b",
    )


def _facts(
    keys: Keys,
    linears: tuple[Linear, ...],
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    max_positions: int | None = None,
    tied: bool = False,
    outer_norms: int = 1,
    learned_positions: int = 0,
    **own: Any,
) -> ModelFacts:
    """The keys that all families share, in the spellings they have; `own` are fields of layers that are no Llama's."""
    hidden, heads = keys.count("hidden_size", "n_embed"), keys.count("num_attention_heads", "n_head")
    if head_dim is None:
        keys.divides("num_attention_heads", heads, "hidden_size", hidden)
    keys.divides("num_key_value_heads", kv_heads or heads, "num_attention_heads", heads)
    shape = LayerShape(
        hidden=hidden,
        linears=linears,
        intermediate=next(linear.inputs for linear in linears if linear.reads == "mlp_out"),
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        **own,
    )
    return ModelFacts(
        name=keys.name,
        family=keys.text("model_type"),
        layers=(LayerRun(shape, keys.count("num_hidden_layers", "n_layer", most=10_000)),),
        vocab=keys.count("vocab_size"),
        max_positions=keys.count("max_position_embeddings", "model_max_length", "seq_length", default=max_positions),
        tied_embeddings=keys.flag("tie_word_embeddings", default=tied),
        outer_norms=outer_norms,
        learned_positions=learned_positions,
    )


def _grouped(keys: Keys) -> ModelFacts:
    """Llama, Mistral, Qwen2, Qwen3, GLM, GLM-4: RMS norms, grouped queries, a gated MLP.

    GLM has gate and up in one linear; `glm4` adds norms behind attention and MLP; Qwen2 always has q, k, v biases.
    """
    family = keys.text("model_type")
    glm, qwen3 = family in ("glm", "glm4"), family == "qwen3"
    hidden, inner, heads = (keys.count(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads = keys.count("num_key_value_heads", default=heads)
    if not (glm or qwen3 or keys.states("head_dim")):
        keys.divides("num_attention_heads", heads, "hidden_size", hidden)
    head_dim = keys.count("head_dim", default=128 if glm or qwen3 else hidden // heads)
    bias = family not in ("mistral", "qwen2") and keys.flag("attention_bias", default=glm)
    mlp_bias = family == "llama" and keys.flag("mlp_bias", default=False)
    up = [("gate_up_proj", 2 * inner)] if glm else [("gate_proj", inner), ("up_proj", inner)]
    linears = (
        Linear("q_proj", hidden, heads * head_dim, bias or family == "qwen2", "attention_in"),
        Linear("k_proj", hidden, kv_heads * head_dim, bias or family == "qwen2", "attention_in"),
        Linear("v_proj", hidden, kv_heads * head_dim, bias or family == "qwen2", "attention_in"),
        Linear("o_proj", heads * head_dim, hidden, bias and not glm, "attention_out"),
        *(Linear(leaf, hidden, width, mlp_bias, "mlp_in") for leaf, width in up),
        Linear("down_proj", inner, hidden, mlp_bias, "mlp_out"),
    )
    return _facts(
        keys, linears, head_dim=head_dim, kv_heads=kv_heads, qk_norm=qwen3,
        norms=4 if family == "glm4" else 2, attention="repacked" if glm else "flash",
    )  # fmt: skip


def _baichuan(keys: Keys) -> ModelFacts:
    """Baichuan 1 and 2, from the code in their repositories: Llama's layer with q, k, v in W_pack.

    As in vLLM, the width tells the 7B models, with rotary positions, from the 13B ones, with ALiBi.
    """
    hidden, inner = keys.count("hidden_size"), keys.count("intermediate_size")
    linears = (
        Linear("W_pack", hidden, 3 * hidden, False, "attention_in"),
        Linear("o_proj", hidden, hidden, False, "attention_out"),
        Linear("gate_proj", hidden, inner, False, "mlp_in"),
        Linear("up_proj", hidden, inner, False, "mlp_in"),
        Linear("down_proj", inner, hidden, False, "mlp_out"),
    )
    return _facts(keys, linears, attention="flash" if hidden == 4096 else "eager")


def _bloom(keys: Keys) -> ModelFacts:
    """BLOOM: a norm behind the embedding, ALiBi, biases everywhere, no bound on positions but the trained 2,048."""
    hidden = keys.count("hidden_size", "n_embed")
    linears = _fused(hidden, 4 * hidden, True)
    return _facts(
        keys,
        linears,
        norm="layer",
        outer_norms=2,
        tied=True,
        mlp="gelu",
        attention="eager",
        max_positions=2048,
    )


def _gpt_neox(keys: Keys) -> ModelFacts:
    """GPT-NeoX and Pythia: rotary positions, attention and MLP side by side."""
    bias = keys.flag("attention_bias", default=True)
    linears = _fused(keys.count("hidden_size"), keys.count("intermediate_size"), bias)
    return _facts(keys, linears, norm="layer", mlp="gelu", attention="repacked")


def _fused(hidden: int, inner: int, attention_bias: bool) -> tuple[Linear, ...]:
    return (
        Linear("query_key_value", hidden, 3 * hidden, attention_bias, "attention_in"),
        Linear("dense", hidden, hidden, attention_bias, "attention_out"),
        Linear("dense_h_to_4h", hidden, inner, True, "mlp_in"),
        Linear("dense_4h_to_h", inner, hidden, True, "mlp_out"),
    )


def _opt(keys: Keys) -> ModelFacts:
    """OPT: learned positions, two rows more than it can use. The 350M variant has shapes of its own and is refused."""
    hidden, inner = keys.count("hidden_size"), keys.count("ffn_dim")
    embedded, bias = keys.count("word_embed_proj_dim", default=hidden), keys.flag("enable_bias", default=True)
    norm_first = keys.flag("do_layer_norm_before", default=True)
    if embedded != hidden or not norm_first or not keys.flag("layer_norm_elementwise_affine", default=True):
        raise ModelError(
            f"{keys.name}: OPT with a projected embedding or norms behind is not supported", try_="opt-1.3b"
        )
    linears = (
        *(Linear(leaf, hidden, hidden, bias, "attention_in") for leaf in ("k_proj", "v_proj", "q_proj")),
        Linear("out_proj", hidden, hidden, bias, "attention_out"),
        Linear("fc1", hidden, inner, bias, "mlp_in"),
        Linear("fc2", inner, hidden, bias, "mlp_out"),
    )
    rows = keys.count("max_position_embeddings") + 2
    mlp = "relu" if keys.text("activation_function", default="relu") == "relu" else "gelu"
    return _facts(keys, linears, norm="layer", mlp=mlp, tied=True, learned_positions=rows)


_READERS: dict[str, Callable[[Keys], ModelFacts]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "glm", "glm4"), _grouped),
    "baichuan": _baichuan,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
