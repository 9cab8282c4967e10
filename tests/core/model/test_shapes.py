"""What is a model made of? Counts against published ones, and shapes against transformers' own modules."""

from typing import Any

import msgspec
import pytest

from qdist.core.errors import ModelError
from qdist.core.model.adapters.registry import adapter_parameters
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "opt-6.7b": 6_658_473_984,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "pythia-6.9b": 6_857_302_016,
    "glm-4-9b": 9_399_951_360,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "phi-4": 14_659_507_200,
    "granite-8b": 8_170_864_640,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
}


@pytest.mark.parametrize(("alias", "parameters"), PUBLISHED.items())
def test_parameter_totals_are_the_published_ones(alias: str, parameters: int) -> None:
    assert from_config(config_of(alias), name=alias).parameters == parameters


@pytest.mark.parametrize(
    ("alias", "millions"), [("llama-7b", 159.9), ("llama-13b", 250.3), ("llama-33b", 487.6), ("llama-65b", 799.5)]
)
def test_adapters_at_rank_64_have_the_size_that_qlora_published(alias: str, millions: float) -> None:
    facts = from_config(config_of(alias), name=alias)
    assert adapter_parameters(facts, 64, facts.linear_names) / 1e6 == pytest.approx(millions, abs=0.1)
    assert adapter_parameters(facts, 64, ("all-linear",)) == adapter_parameters(facts, 64, facts.linear_names)


def test_the_config_that_transformers_writes_back_gives_the_same_facts() -> None:
    transformers = pytest.importorskip("transformers")
    for alias in (
        "llama3.2-1b",
        "qwen3-8b",
        "bloom-7b1",
        "opt-6.7b",
        "pythia-6.9b",
        "glm-4-9b",
        "olmo2-7b",
        "phi-4",
        "gemma3-12b",
        "mistral-small-24b",
        "qwen3-30b-a3b",
        "qwen3.5-9b",
        "gpt-oss-20b",
        "granite-8b",
    ):
        written = transformers.AutoConfig.for_model(**config_of(alias)).to_dict()
        assert from_config(written, name=alias) == from_config(config_of(alias), name=alias)


def test_glm4_has_four_norms_a_layer() -> None:
    glm = config_of("glm-4-9b")
    four, two = from_config(glm | {"model_type": "glm4"}, name="glm4"), from_config(glm, name="glm")
    assert four.parameters - two.parameters == 40 * 2 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": "mamba"}, "model_type 'mamba'.*\n.*bloom, .*glm4, .*qwen3"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers = '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_config(config_of("llama-7b") | change, name="llama-7b")


@pytest.mark.parametrize("change", [{"word_embed_proj_dim": 512}, {"do_layer_norm_before": False}])
def test_an_opt_with_projected_embeddings_or_norms_behind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="projected embedding or norms behind"):
        from_config(config_of("opt-125m") | change, name="opt-350m")


def test_a_target_that_is_no_linear_is_refused_with_the_nearest_one() -> None:
    facts = from_config(config_of("llama-7b"), name="llama-7b")
    with pytest.raises(ModelError, match=r"no linear 'qproj'(.|\n)*try: --set lora.targets=q_proj"):
        facts.targeted(("qproj",))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 0}, "hidden_size = 0; it must be a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": -4}, "num_attention_heads = -4"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers = '12'"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 1000000000000000000000000000000; .* to 10,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"vocab_size": 1.5}, "vocab_size = 1.5"),
        ({"vocab_size": [32_000] * 99}, r"vocab_size = \[32000, 32000, .*\.\.\.; it must be"),
        ({"num_attention_heads": 3}, "hidden_size = 4096, which is not a multiple of num_attention_heads = 3"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32, which is not a multiple of num_key_value_heads = 5"),
        ({"attention_bias": "no"}, "attention_bias = 'no'; it must be true or false"),
        ({"model_type": ["llama"]}, r"model_type \"\['llama'\]\""),
        ({"model_type": "mine", "auto_map": {}}, "model_type 'mine', which qdist does not know\n"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "own.Config"}}, "and brings code of its own"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_config(config_of("llama-7b") | keys, name="mine")
    assert caught.value.try_


@pytest.mark.parametrize(("qk_norm", "widths"), [(False, ()), (True, (16, 16)), ("whole", (64, 32))])
def test_norms_of_queries_and_keys_are_over_a_head_or_over_all(qk_norm: Any, widths: tuple[int, ...]) -> None:
    (shape,) = from_config(config_of("llama-7b"), name="llama-7b").shapes
    shape = msgspec.structs.replace(shape, heads=4, kv_heads=2, head_dim=16, qk_norm=qk_norm)
    assert shape.qk_norm_widths == widths
    assert shape.norm_parameters == 2 * 4096 + sum(widths)
