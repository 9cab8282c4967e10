"""Are the facts of an unlisted model those of its class, parameter by parameter?"""

from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig

from qdist.core.errors import ModelError
from qdist.core.model.aliases import ALIASES, config_of
from qdist.core.model.families import FAMILIES as KNOWN
from qdist.core.model.families import from_config
from qdist.core.model.shapes import Linear, ModelFacts
from qdist.core.requests import Answer, Describe
from qdist.runtime.model.classes import config_of as config_of_content
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.describe import describe, facts_of
from qdist.runtime.model.parts import layers_path
from qdist.runtime.tasks import answer_to
from tests.runtime.every_model import tiny_model

NO_CLASS = {alias for alias in ALIASES if KNOWN[config_of(alias)["model_type"]].own_code}
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**SMALL, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
                           "moe_intermediate_size": 128}  # fmt: skip
LATENT: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "q_lora_rank": 96, "kv_lora_rank": 96, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 32,
                         "mamba_chunk_size": 32, "mamba_expand": 2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": SMALL,
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "gemma4_text": {**SMALL, "global_head_dim": 128, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 64,
                    "vocab_size_per_layer_input": 320,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": SMALL,
    "phi3": SMALL,
    "smollm3": SMALL,
    "olmo3": SMALL,
    "granite": SMALL,
    "cohere2": SMALL,
    "seed_oss": SMALL,
    "starcoder2": SMALL,
    "stablelm": SMALL,
    "gpt2": {"vocab_size": 320, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "gptj": {"vocab_size": 320, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 32},
    "mpt": {"vocab_size": 320, "d_model": 256, "n_layers": 4, "n_heads": 4},
    "falcon": {key: value for key, value in SMALL.items() if key != "head_dim"},
    "codegen": {"vocab_size": 320, "n_embd": 256, "n_layer": 4, "n_head": 4, "rotary_dim": 32},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 192},
    "olmoe": EXPERTS,
    "gpt_oss": EXPERTS,
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 384},
    "granitemoe": EXPERTS,
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 192},
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "qwen3_5_text": {**SMALL, **DELTA},
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 192},
    "qwen3_5_moe_text": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 192},
    "lfm2": {**SMALL, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "bamba": {**SMALL, **MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**SMALL, **MAMBA, "mamba_d_ssm": 512},
    "mamba": {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 4},
    "jamba": {**EXPERTS, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2},
    "rwkv": {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 4},
    "recurrent_gemma": {**SMALL, "lru_width": 256},
}  # fmt: skip


def of(family: str, **changes: Any) -> ModelFacts:
    return describe(AutoConfig.for_model(family, **FAMILIES[family] | changes), name=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_an_unlisted_model_are_those_of_its_class(family: str) -> None:
    facts = of(family)
    model = empty_model(AutoConfig.for_model(family, **FAMILIES[family]))
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.layer_count == 4
    assert not facts.measured


@pytest.mark.parametrize("family", FAMILIES)
def test_every_packed_linear_is_a_module_of_its_layer(family: str) -> None:
    """By the path that the facts pack, with the shape that they state."""
    facts = of(family)
    model = empty_model(AutoConfig.for_model(family, **FAMILIES[family]))
    packed = [path for path, module in model.named_modules() if hasattr(module, "weight") and facts.packs(path)]
    assert len(packed) == sum(run.count * len(run.shape.linears) for run in facts.layers)
    weights = sum(model.get_submodule(path).weight.numel() for path in packed)
    experts = sum(run.count * run.shape.experts.weights for run in facts.layers if run.shape.experts)
    assert weights + experts == facts.linear_weights


def test_linears_that_the_class_holds_transposed_say_so() -> None:
    assert all(linear.transposed for linear in of("gpt2").linears)
    assert not any(linear.transposed for linear in of("phi").linears)


def test_linears_that_only_choose_are_neither_packed_nor_adapted() -> None:
    """The indexer of DeepSeek's sparse attention computes without gradients."""
    config = {**LATENT, "index_n_heads": 4, "index_head_dim": 64, "index_topk": 16}
    shapes = describe(AutoConfig.for_model("deepseek_v32", **config), name="deepseek").shapes
    assert not any("indexer" in linear.within or linear.name == "wq_b" for shape in shapes for linear in shape.linears)
    reasons = {kept.path: kept.reason for kept in shapes[0].kept}
    assert reasons["self_attn.indexer.wq_b"] == reasons["self_attn.indexer.wk"] == "computed without gradients"


def test_the_layers_of_a_tower_are_not_taken_for_those_of_the_text() -> None:
    """GIT's image encoder has as many, and more parameters, in a model that is no wrapper."""
    assert layers_path(tiny_model("git")) == "git.encoder.layer"


def test_a_model_that_drafts_for_another_is_refused() -> None:
    with pytest.raises(ModelError, match="drafts for another model, whose keys and values it reads"):
        describe(AutoConfig.for_model("gemma4_assistant"), name="drafter")


def test_an_infinite_number_of_a_configuration_is_read_as_transformers_writes_it() -> None:
    limits = [0.0, {"__float__": "Infinity"}]
    config = config_of_content({"model_type": "bamba", **FAMILIES["bamba"], "time_step_limit": limits})
    assert tuple(config.time_step_limit) == (0.0, float("inf"))


def test_a_linear_of_a_fused_kernel_stays_in_16_bits() -> None:
    recurrent, attends, *_ = of("bamba").shapes
    assert [linear.name for linear in recurrent.linears][-1] == "in_proj"
    assert ("mamba.out_proj", "read by a fused kernel") in [(kept.path, kept.reason) for kept in recurrent.kept]
    assert (recurrent.mixer, attends.mixer) == ("recurrent", "attention")


def test_a_linear_that_the_model_rescales_in_place_stays_in_16_bits() -> None:
    kept = {kept.path: kept.reason for kept in of("rwkv").shapes[0].kept}
    assert kept["attention.output"] == kept["feed_forward.value"] == "rescaled in place by the model"


def test_shared_experts_of_a_class_named_so_are_experts_all_the_same() -> None:
    (shape,) = of("granitemoeshared").shapes
    assert shape.experts is not None
    assert [linear.name for linear in shape.linears][-2:] == ["input_linear", "output_linear"]


def test_experts_carry_their_layout() -> None:
    (shape,) = of("gpt_oss").shapes
    assert shape.experts is not None
    assert (shape.experts.path, shape.experts.count, shape.experts.active) == ("mlp.experts", 8, 2)
    assert shape.experts.transposed
    assert shape.experts.matrices == (
        Linear("gate_up_proj", 256, 768, True, "mlp_in"),
        Linear("down_proj", 384, 256, True, "mlp_out"),
    )
    assert {kept.path: kept.reason for kept in shape.kept} == {
        "self_attn.sinks": "attention sinks",
        "mlp.router": "router",
    }


def test_linears_of_one_name_are_told_apart_by_the_module_that_has_them() -> None:
    (shape,) = of("gpt2").shapes
    assert [(linear.within, linear.name) for linear in shape.linears] == [
        ("", "c_attn"), ("attn", "c_proj"), ("", "c_fc"), ("mlp", "c_proj"),
    ]  # fmt: skip
    assert shape.packs("attn.c_proj")
    assert not shape.packs("other.c_proj")


def test_layers_that_read_others_keys_stay_together_with_them() -> None:
    facts = of("gemma4_text")
    assert facts.together_from == 0
    assert "per_layer_input" in facts.unsplit
    assert not of("gemma4_text", num_kv_shared_layers=0, hidden_size_per_layer_input=0).unsplit


def test_layers_that_text_without_images_skips_are_not_adapted() -> None:
    config = AutoConfig.for_model("mllama", text_config={**SMALL, "cross_attention_layers": [1]})
    facts = describe(config, name="mllama")
    kinds = [{kept.reason for kept in shape.kept} for shape in facts.shapes]
    assert [len(shape.linears) for shape in facts.shapes] == [7, 0, 7]
    assert "of a layer that text without images skips" in kinds[1]


def test_a_linear_whose_adapter_would_be_loaded_under_another_name_is_not_adapted() -> None:
    config = AutoConfig.for_model("laguna", **EXPERTS, shared_expert_intermediate_size=192)
    shape = describe(config, name="laguna").shapes[-1]
    assert not any("shared" in linear.within for linear in shape.linears)
    reasons = {kept.path: kept.reason for kept in shape.kept}
    assert reasons["mlp.shared_experts.up_proj"] == "its adapter would be loaded under another name"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_family_has_such_linears(family: str) -> None:
    reasons = {kept.reason for shape in of(family).shapes for kept in shape.kept}
    assert "its adapter would be loaded under another name" not in reasons


def test_small_gates_stay_in_16_bits() -> None:
    recurrent = of("qwen3_5_text").shapes[0]
    small = [kept.path for kept in recurrent.kept if kept.reason == "too small to pack"]
    assert small == ["linear_attn.in_proj_b", "linear_attn.in_proj_a"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "bart"}, "is an encoder-decoder"),
        ({"model_type": "t5"}, "is an encoder-decoder"),
        ({"model_type": "xlnet"}, "is an encoder"),
        ({"model_type": "prophetnet", "is_encoder_decoder": False}, "is the decoder of an encoder-decoder"),
        ({"model_type": "reformer", "is_decoder": True}, "has reversible layers"),
        ({"model_type": "blt"}, "has no list of decoder layers of its own"),
        ({"model_type": "nobody_knows"}, "which transformers has no class for"),
        ({"model_type": "nobody", "auto_map": {"AutoModel": "x.y"}}, "Python files out of its own repository"),
        ({"model_type": "apertus", "hidden_size": "much"}, "transformers makes no"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        facts_of(config, name="mine")


def test_a_request_to_describe_is_answered_with_facts() -> None:
    config = {"model_type": "starcoder2", **SMALL}
    answer = answer_to(Describe(config=config, name="mine"))
    assert answer.facts == facts_of(config, name="mine")
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer


def test_a_known_family_answers_from_its_own_file() -> None:
    facts = facts_of({"model_type": "llama", **SMALL}, name="mine")
    assert facts.measured


@pytest.mark.parametrize("alias", sorted(ALIASES.keys() - NO_CLASS))
def test_the_class_of_a_known_family_is_described_as_its_file_has_it(alias: str) -> None:
    """Both ways to a model's facts say the same, of every model that has a name."""
    known = from_config(config_of(alias), name=alias)
    described = describe(AutoConfig.for_model(**config_of(alias)), name=alias)
    assert counted(described) == counted(known)


def counted(facts: ModelFacts) -> Any:
    """What can be counted in a model, whatever its order in a layer, without how its attention is computed."""
    layers = [
        (
            run.count,
            {(linear.name, linear.inputs, linear.outputs, linear.bias) for linear in run.shape.linears},
            {(kept.path, kept.parameters) for kept in run.shape.kept},
            (run.shape.hidden, run.shape.heads, run.shape.kv_heads, run.shape.head_dim, run.shape.intermediate),
            (run.shape.norm, run.shape.norms, run.shape.qk_norm, run.shape.mlp, run.shape.mixer, run.shape.experts),
        )
        for run in facts.layers
    ]
    outside = (facts.vocab, facts.tied_embeddings, facts.outer_norms, facts.outer_parameters, facts.learned_positions)
    return layers, outside, facts.modules, facts.together_from, facts.left_out, facts.parameters


def test_a_mixer_whose_class_is_named_for_gates_and_experts_is_no_router() -> None:
    recurrent = of("qwen3_5_moe_text").shapes[0]
    assert [linear.name for linear in recurrent.linears][:3] == ["out_proj", "in_proj_qkv", "in_proj_z"]
    assert {kept.path for kept in recurrent.kept if kept.reason == "router"} == {"mlp.gate"}


WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": SMALL | {"model_type": "gemma3_text"},
    "mistral3": SMALL | {"model_type": "mistral"},
    "qwen3_5": FAMILIES["qwen3_5_text"] | {"model_type": "qwen3_5_text"},
    "gemma4": FAMILIES["gemma4_text"] | {"model_type": "gemma4_text"},
    "qwen3_vl": SMALL | {"model_type": "qwen3_vl_text"},
    "llama4": FAMILIES["llama4_text"] | {"model_type": "llama4_text"},
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_computes_text_without_its_towers_under_the_names_of_the_whole_model(kind: str) -> None:
    towers: dict[str, Any] = {"vision_config": {}} if kind == "gemma4" else {}  # the others have one by default
    config = AutoConfig.for_model(kind, text_config=WRAPPERS[kind], **towers)
    facts = describe(config, name=kind)
    whole = dict(empty_model(config, whole=True).named_parameters())
    model = empty_model(config)
    assert dict(model.named_parameters()).keys() < whole.keys()
    left = sum(tower.parameters for tower in facts.left_out)
    assert facts.parameters + left == sum(value.numel() for value in whole.values())
    tokens = torch.arange(8).unsqueeze(0)
    real = _real(model)
    hidden = real.get_submodule(facts.modules.layers.rpartition(".")[0])(input_ids=tokens)[0]
    assert hidden.shape == (1, 8, 256)
    assert real(input_ids=tokens).logits.shape == (1, 8, 320)


def _real(model: Any) -> Any:
    """The model with small random weights; its buffers are real already."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            module.register_parameter(name, torch.nn.Parameter(values))
    model.tie_weights()
    return model.eval()
