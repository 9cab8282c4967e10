"""Which facts are there of a model's configuration: a family's own, or those of transformers' class built on meta."""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qdist.core.errors import ModelError
from qdist.core.model.families import FAMILIES, from_config, own_code
from qdist.core.model.shapes import Kept, LayerRun, LayerShape, ModelFacts, Modules
from qdist.core.requests import Describe
from qdist.host.opening import told
from qdist.runtime.model.classes import config_of, empty_model, leave_out_towers, read_softcap
from qdist.runtime.model.layer_parts import SHARED, Facts, is_linear, read, shape_of, weights_rescaled
from qdist.runtime.model.own_code import require_class
from qdist.runtime.model.parts import layers_path, modules_around

_POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "model_max_length",
    "max_sequence_length", "context_length", "max_target_positions",
)  # fmt: skip
_UNLIMITED = 1 << 20
"""Positions of a model that states no limit, as those without attention do."""
_USUAL_ARGUMENTS = frozenset(
    (
        "self", "hidden_states", "x", "attention_mask", "mask", "position_ids", "past_key_value", "past_key_values",
        "use_cache", "cache_position", "cache_params", "cache_param", "position_embeddings", "output_attentions",
        "output_router_logits", "output_hidden_states", "kwargs", "head_mask", "layer_head_mask", "layer_past",
        "encoder_hidden_states", "encoder_attention_mask", "causal_mask", "state", "cache", "layer_idx", "residual",
        "alibi", "position_bias", "params", "token_type_ids", "sequence_length", "linear_attn_mask",
        "activations", "hidden", "codebook_idx", "shared_kv_states",
        "cu_seq_lens_q", "mamba_attention_mask", "return_dict", "cross_attn_layer_head_mask", "padding_mask",
        "cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask", "position_embeddings_global",
        "position_embeddings_local", "conv_mask", "rotary_emb", "time_mix_state",
    )
)  # fmt: skip
"""What a decoder layer may be given besides hidden states, without its stage needing anything of another."""
_CROSS_ATTENTION = re.compile(r"\b(encoder_attn|crossattention|cross_attn)\b")
"""Attention to an encoder. Some layers of a decoder of text and images have it too (Mllama), but not all."""


def run(request: Describe) -> ModelFacts:
    """Answer a request of a command."""
    if request.code:
        require_class(Path(request.code), request.name, trusted=True)
    return facts_of(request.config, name=request.name)


def facts_of(config: Any, *, name: str) -> ModelFacts:
    """Facts of a configuration: a known family's, otherwise those of transformers' class.

    config: transformers', or the content of a config.json.

    Raises ModelError for a model that transformers has no class for, or that is no causal language model.
    """
    if not isinstance(config, Mapping):
        known = config.model_type in FAMILIES
        return from_config(config.to_dict(), name=name) if known else describe(deepcopy(config), name=name)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in FAMILIES:
        return from_config(config, name=name)
    return describe(open_mapping(config, name=name), name=name)


def open_mapping(config: Mapping[str, Any], *, name: str) -> Any:
    """transformers' configuration of a config.json's content. Raises ModelError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise own_code(name)
        raise ModelError(
            f"{name} has model_type {kind!r}, which transformers has no class for",
            try_="a newer transformers, or a model of a family that it knows",
        )
    with told(f"{name}: transformers makes no configuration of its config.json", ModelError, try_=_PUBLISHED):
        return config_of(config)


_PUBLISHED = "its published config.json"


def describe(config: Any, *, name: str) -> ModelFacts:
    """The facts of transformers' class for a configuration, which is built on the meta device and walked.

    config: transformers'.
    Raises ModelError for a class that is no causal decoder, or whose parameters are not all found.
    """
    if why := why_not_by_config(config):
        raise _refusal(name, why)
    with told(f"{name}: transformers makes no model of its config.json", ModelError, try_=_PUBLISHED):
        model = empty_model(config, whole=True)
    every = _unique(model)
    left_out = leave_out_towers(model)
    if why := why_not(config, model):
        raise _refusal(name, why)
    if "_ReversibleFunction" in inspect.getsource(sys.modules[type(model).__module__]):
        raise ModelError(
            f"{name} has reversible layers, whose own backward pass gives adapters above frozen embeddings no gradient",
            try_="another model",
        )
    facts = _described(model, left_out, name)
    counted = facts.parameters + sum(tower.parameters for tower in left_out)
    if counted != every:
        raise ModelError(
            f"{name}: of the {every:,} parameters of {type(model).__name__}, qdist finds {counted:,}",
            try_="qdist doctor: transformers may be of another version",
        )
    return facts


def why_not(config: Any, model: Any) -> str:
    """Why a model cannot be fine-tuned as a causal language model, to follow 'is' or 'has'; empty if it can."""
    if why := why_not_by_config(config):
        return why
    own = config.get_text_config(decoder=True)
    if getattr(own, "is_decoder", None) is False and "if not config.is_decoder" in inspect.getsource(type(model)):
        return "is an encoder: its config.json does not say is_decoder = true"
    path = layers_path(model)
    if not path:
        return "has no list of decoder layers of its own"
    layers = model.get_submodule(path)
    if all(_CROSS_ATTENTION.search(" ".join(dict(layer.named_children()))) for layer in layers.children()):
        return "is the decoder of an encoder-decoder"
    if not any(map(is_linear, layers.modules())):
        return "has no linear in its decoder layers"
    if model.get_output_embeddings() is None:
        return "has no output head"
    return ""


def why_not_by_config(config: Any) -> str:
    """The same, of what the configuration alone tells."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if getattr(config, "causal", None) is False or getattr(config, "attn_type", None) == "bi":
        return "is an encoder: its attention looks both ways"
    if "shared_kv_states" in inspect.signature(_class_of_text(config).forward).parameters:
        return "drafts for another model, whose keys and values it reads"
    return ""


def _class_of_text(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)


def _refusal(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} {why}, and is not fine-tuned as a causal language model", try_="a decoder such as llama3.2-1b"
    )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _unique(module: nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _described(model: Any, left_out: tuple[Kept, ...], name: str) -> ModelFacts:
    path, config = layers_path(model), _text_config(model)
    layers = list(model.get_submodule(path))
    embedding = model.get_input_embeddings().weight
    hidden = embedding.shape[1]
    counted: set[int] = set()
    shared = _shared(layers)
    decoder: Any = type(model.get_submodule(path.rpartition(".")[0]))
    facts = Facts(config, hidden, _attention(model, layers[0]), shared, weights_rescaled(decoder))
    shapes = [shape_of(layer, facts, counted) for layer in layers]
    runs = tuple(LayerRun(shape, len(list(same))) for shape, same in groupby(shapes))
    head = model.get_output_embeddings()
    rows = min(len(embedding), len(head.weight))
    tied = head.weight is embedding
    modules = modules_around(model, path)
    norms = [each for path in (*modules.before, modules.final_norm) if (each := _norm_at(model, path, runs))]
    positions = _position_rows(model, modules, hidden)
    named = {id(embedding), id(head.weight)}
    named.update(id(parameter) for norm in norms for parameter in norm.parameters())
    if positions:
        named.update(id(model.get_submodule(added).weight) for added in modules.added)
    outer = sum(each.numel() for each in model.parameters() if id(each) not in named and id(each) not in counted)
    outer += embedding.numel() + (0 if tied else head.weight.numel()) - (1 if tied else 2) * rows * hidden
    return ModelFacts(
        name=name,
        family=str(model.config.model_type),
        layers=runs,
        vocab=rows,
        max_positions=read(config, *_POSITIONS, default=_UNLIMITED),
        tied_embeddings=tied,
        outer_norms=len(norms),
        learned_positions=positions,
        modules=modules,
        together_from=_together_from(config, len(layers)),
        outer_parameters=outer,
        left_out=left_out,
        measured=False,
        unsplit=_unsplit(layers[0], shapes, config),
    )


def _norm_at(model: nn.Module, path: str, runs: tuple[LayerRun, ...]) -> nn.Module | None:
    """The module at a path if it is a norm over the hidden size, of the kind that the layers have."""
    found: nn.Module = model.get_submodule(path)
    return found if path and _unique(found) == runs[0].shape.norm_width else None


def _shared(layers: list[nn.Module]) -> frozenset[int]:
    """Identities of the parameters that several layers have."""
    seen = Counter(key for layer in layers for key in {id(parameter) for parameter in layer.parameters()})
    return frozenset(key for key, count in seen.items() if count > 1)


def _attention(model: Any, layer: nn.Module) -> Literal["flash", "repacked", "eager"]:
    """Queries are laid out anew where the class joins their rotating part with one that passes."""
    capped = read_softcap(_text_config(model)) is not None
    if capped or not getattr(model, "_supports_sdpa", False):
        return "eager"
    code = inspect.getsource(sys.modules[type(layer).__module__])
    return "repacked" if re.search(r"\b(q|query)_(pass|nope)\b", code) else "flash"


def _position_rows(model: nn.Module, modules: Modules, hidden: int) -> int:
    """Rows of the learned tables of positions."""
    tables: list[Any] = [model.get_submodule(path) for path in modules.added]
    return sum(table.weight.shape[0] for table in tables) if all(t.weight.shape[1] == hidden for t in tables) else 0


def _together_from(config: Any, count: int) -> int | None:
    """First of the layers that must be in one stage, where the last ones read keys and values of earlier ones.

    They read those of the last layer of their kind that has its own.
    """
    readers = read(config, "num_kv_shared_layers")
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * count)
    owners = kinds[: count - readers]
    if not readers or not owners:
        return None
    last = {kind: index for index, kind in enumerate(owners)}
    return min(last[kind] for kind in kinds[count - readers :] if kind in last)


def _unsplit(layer: nn.Module, shapes: list[LayerShape], config: Any) -> str:
    """Why layers need more than the hidden states that the layer before them returns; empty if they do not."""
    if any(kept.reason == SHARED for shape in shapes for kept in shape.kept):
        return "has modules that several of its layers share"
    if read(config, "hc_mult", "altup_num_inputs", "num_residual_streams") > 1:
        return "has several streams of hidden states"
    given = set(inspect.signature(layer.forward).parameters) - _USUAL_ARGUMENTS
    needed = sorted(given - ({"per_layer_input"} if not read(config, "hidden_size_per_layer_input") else set()))
    return f"gives its layers {', '.join(needed)} beside hidden states" if needed else ""
