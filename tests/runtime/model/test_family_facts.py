"""Do the facts that a family's file reads without torch name every parameter of transformers' class?"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qdist.core.model.aliases import ALIASES, config_of
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.shapes import LayerRun, LayerShape, Linear, ModelFacts
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.describe import describe

_GROUPED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LATENT: dict[str, Any] = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
_DELTA: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
VARIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral, wide heads": ("mistral", {**_GROUPED, "head_dim": 24}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3, biases": ("qwen3", {**_GROUPED, "attention_bias": True, "head_dim": 24}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320}),
    "opt": ("opt", {**_GROUPED, "ffn_dim": 96, "word_embed_proj_dim": 64, "enable_bias": False}),
    "gpt_neox, without biases": ("gpt_neox", {**_GROUPED, "num_key_value_heads": 4, "attention_bias": False}),
    "glm": ("glm", {**_GROUPED, "head_dim": 24}),
    "glm4, without biases": ("glm4", {**_GROUPED, "head_dim": 24, "attention_bias": False}),
    "olmo2, biases": ("olmo2", {**_GROUPED, "attention_bias": True}),
    "phi3, tied": ("phi3", {**_GROUPED, "tie_word_embeddings": True}),
    "smollm3, biases": ("smollm3", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "granite, biases": ("granite", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "olmo3": ("olmo3", _GROUPED),
    "cohere2, biases": ("cohere2", {**_GROUPED, "attention_bias": True}),
    "arcee, wide heads": ("arcee", {**_GROUPED, "head_dim": 24, "mlp_bias": True}),
    "seed_oss, biases": ("seed_oss", {**_GROUPED, "attention_out_bias": True, "mlp_bias": True, "head_dim": 24}),
    "gemma2, without a cap on scores": ("gemma2", {**_GROUPED, "head_dim": 24, "attn_logit_softcapping": None}),
    "gemma2, untied": ("gemma2", {**_GROUPED, "head_dim": 24, "tie_word_embeddings": False}),
    "gemma3_text, biases": ("gemma3_text", {**_GROUPED, "head_dim": 24, "attention_bias": True}),
    "gemma3": (
        "gemma3",
        {"text_config": {**_GROUPED, "head_dim": 24}, "vision_config": {**_TOWER, "image_size": 8}},
    ),
    "gemma3, no tower stated": ("gemma3", {"text_config": {"num_hidden_layers": 2}}),
    "gemma4_text, embeddings a layer and shared keys": (
        "gemma4_text",
        {
            **_GROUPED, "num_hidden_layers": 7, "head_dim": 16, "global_head_dim": 24, "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True, "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 300,
            "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
        },
    ),
    "gemma4, experts and keys that are values": (
        "gemma4",
        {
            "text_config": {
                **_GROUPED, "head_dim": 16, "global_head_dim": 24, "attention_k_eq_v": True,
                "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
                "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24,
                "layer_types": [_SLIDING, _SLIDING, _FULL, _FULL],
            },
            "vision_config": {**_TOWER, "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 9},
        },
    ),
    "ministral3, tied": ("ministral3", {**_GROUPED, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral3": (
        "mistral3",
        {
            "text_config": {**_GROUPED, "head_dim": 24, "model_type": "mistral"},
            "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 16},
            "vision_feature_layer": [-1, -2], "multimodal_projector_bias": True, "tie_word_embeddings": False,
        },
    ),
    "mistral3, no tower stated": ("mistral3", {"text_config": {**_GROUPED, "model_type": "ministral3"}}),
    "qwen3_moe, some layers dense": (
        "qwen3_moe",
        {
            **_GROUPED, "num_hidden_layers": 6, "head_dim": 24, "moe_intermediate_size": 24, "num_experts": 8,
            "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True,
        },
    ),
    "mixtral, wide heads": ("mixtral", {**_GROUPED, "head_dim": 24, "num_local_experts": 6}),
    "gpt_oss, without biases": (
        "gpt_oss", {**_GROUPED, "head_dim": 24, "num_local_experts": 6, "attention_bias": False}
    ),
    "qwen3_5_text, layers as listed": (
        "qwen3_5_text", {**_DELTA, "layer_types": [_FULL, "linear_attention", "linear_attention", _FULL]}
    ),
    "qwen3_5": ("qwen3_5", {"text_config": _DELTA, "vision_config": _QWEN_TOWER, "tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_DELTA, "full_attention_interval": 2}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": {**_DELTA, "attention_bias": True}, "vision_config": _QWEN_TOWER}),
    "qwen3_next, some layers dense": (
        "qwen3_next", {**_DELTA, "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [5]}
    ),
    "glm4_moe": (
        "glm4_moe",
        {**_LATENT, "head_dim": 24, "first_k_dense_replace": 2, "use_qk_norm": True, "n_shared_experts": 2},
    ),
    "glm4_moe_lite, layers as listed": (
        "glm4_moe_lite", {**_LATENT, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
    ),
    "deepseek_v2, queries in one, biases": (
        "deepseek_v2", {**_LATENT, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True}
    ),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 2}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 40, "vocab_size": 320}),
}  # fmt: skip
NO_CLASS = {alias for alias, model in ALIASES.items() if FAMILIES[model.config["model_type"]].own_code}


def made(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return empty_model(AutoConfig.for_model(**config), whole=True)


def linears_of(layer: torch.nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear of a layer by its path, as facts have it, but for what it reads."""
    for path, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            yield path, Linear(path.rpartition(".")[2], inputs, outputs, module.bias is not None, "mlp_in")


def check_layer(layer: torch.nn.Module, shape: LayerShape) -> None:
    """Every parameter of a layer is one of a linear, of the experts, of what is kept, or of a norm."""
    left = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    kept = {each.path: each.parameters for each in shape.kept}
    for path, count in kept.items():
        names = [name for name in left if name == path or name.startswith(f"{path}.")]
        assert sum(torch.Size(left.pop(name)).numel() for name in names) == count, path
    packed = [(path, linear) for path, linear in linears_of(layer) if path not in kept]
    assert [(linear.name, linear.inputs, linear.outputs, linear.bias) for _, linear in packed] == [
        (linear.name, linear.inputs, linear.outputs, linear.bias) for linear in shape.linears
    ]
    for (path, _), linear in zip(packed, shape.linears, strict=True):
        assert shape.packs(path)
        assert linear.within in ("", path.rpartition(".")[0])
        left = {name: size for name, size in left.items() if not name.startswith(f"{path}.")}
    if shape.experts:
        count, transposed = shape.experts.count, shape.experts.transposed
        for matrix in shape.experts.matrices:
            sizes = (matrix.inputs, matrix.outputs) if transposed else (matrix.outputs, matrix.inputs)
            assert left.pop(f"{shape.experts.path}.{matrix.name}") == (count, *sizes)
            assert left.pop(f"{shape.experts.path}.{matrix.name}_bias", None) == (
                (count, matrix.outputs) if matrix.bias else None
            )
    norms = [(shape.hidden,)] * (shape.norms * (2 if shape.norm == "layer" else 1))
    assert sorted(left.values()) == sorted([*norms, *((width,) for width in shape.qk_norm_widths)])


def check(model: Any, facts: ModelFacts) -> None:
    """Every parameter of a model stands in its facts, layer by layer."""
    modules = facts.modules
    layers = model.get_submodule(modules.layers)
    assert len(layers) == facts.layer_count
    for index, run in enumerate(facts.run_of_layer):
        check_layer(layers[index], facts.shapes[run])
    embedding, head = model.get_submodule(modules.embedding).weight, model.get_submodule(modules.head).weight
    assert tuple(embedding.shape) == tuple(head.shape) == (facts.vocab, facts.hidden)
    assert (embedding is head) == facts.tied_embeddings
    for path in (*modules.before, *modules.added, *modules.shared, modules.final_norm):
        model.get_submodule(path)
    towers = {each.path: each.parameters for each in facts.left_out}
    found = {path: sum(weight.numel() for weight in model.get_submodule(path).parameters()) for path in towers}
    assert found == towers
    assert facts.parameters == sum(weight.numel() for weight in model.parameters()) - sum(towers.values())


@pytest.mark.parametrize("alias", sorted(ALIASES.keys() - NO_CLASS))
def test_facts_of_an_alias_are_those_of_the_class(alias: str) -> None:
    check(made(config_of(alias)), from_config(config_of(alias), name=alias))


@pytest.mark.parametrize("variant", VARIED)
def test_facts_of_a_varied_configuration_are_those_of_the_class(variant: str) -> None:
    family, keys = VARIED[variant]
    config = {"model_type": family, **keys}
    model, facts = made(config), from_config(config, name=variant)
    check(model, facts)
    assert facts.family == family
    for written in (model.config.to_dict(), model.config.to_diff_dict()):
        assert from_config({**written, "model_type": family}, name=variant) == facts


def comparable(facts: ModelFacts) -> ModelFacts:
    """Facts without the order of what is kept, and without what no class tells: BLOOM was trained on 2,048 tokens, and
    Liger's rotation takes the place of Phi-3's."""
    layers = tuple(
        LayerRun(
            structs.replace(
                run.shape,
                kept=tuple(sorted(run.shape.kept, key=str)),
                # A class does not tell what takes the place of its rotation.
                attention="repacked" if run.shape.attention == "joined" else run.shape.attention,
            ),
            run.count,
        )
        for run in facts.layers
    )
    outer = facts.outer_parameters + facts.outer_norm_parameters
    known = structs.replace(facts, layers=layers, outer_norms=0, outer_parameters=outer, measured=False)
    return structs.replace(known, max_positions=0) if facts.family == "bloom" else known


@pytest.mark.parametrize("variant", VARIED)
def test_the_class_is_described_as_its_family_has_it(variant: str) -> None:
    family, keys = VARIED[variant]
    config = {"model_type": family, **keys}
    described = describe(AutoConfig.for_model(**config), name=variant)
    assert comparable(described) == comparable(from_config(config, name=variant))


def test_every_family_that_transformers_has_a_class_for_is_varied() -> None:
    assert {family for family, _ in VARIED.values()} == {key for key, own in FAMILIES.items() if not own.own_code}


def test_layers_that_read_keys_and_values_of_others_lie_in_one_stage_with_them() -> None:
    family, keys = VARIED["gemma4_text, embeddings a layer and shared keys"]
    facts = from_config({"model_type": family, **keys}, name="")
    assert facts.together_from == 2
    assert "per_layer_input" in facts.unsplit
