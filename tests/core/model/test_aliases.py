"""Which models does qdist know by a short name?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdist.core.errors import ModelError
from qdist.core.model.aliases import ALIASES, config_of, lookup, same_shape
from qdist.core.model.families import from_config


@pytest.mark.parametrize(
    ("spelling", "alias"),
    [
        ("llama-7b", "llama-7b"),
        ("LLaMA-7B", "llama-7b"),
        ("llama-2-7b", "llama2-7b"),
        ("Llama2-7B", "llama2-7b"),
        ("llama2_7b", "llama2-7b"),
        ("llama3-8b", "llama3-8b"),
        ("llama-3-8b", "llama3-8b"),
        ("Llama-3.2-1B", "llama3.2-1b"),
        ("llama-30b", "llama-33b"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("qwen-2.5-7b", "qwen2.5-7b"),
        ("Qwen3-0.6B", "qwen3-0.6b"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("bigscience/bloom", "bloom-176b"),
        ("glm4-9b", "glm-4-9b"),
        ("mistral-7b-v0.3", "mistral-7b"),
        ("OLMo-2-7B", "olmo2-7b"),
        ("gemma-3-12b", "gemma3-12b"),
        ("phi4", "phi-4"),
        ("Qwen3.5-9B", "qwen3.5-9b"),
    ],
)
def test_a_model_is_found_in_every_usual_spelling(spelling: str, alias: str) -> None:
    assert lookup(spelling) is ALIASES[alias]


def test_every_alias_and_hub_id_finds_its_own_model() -> None:
    for alias, model in ALIASES.items():
        assert lookup(alias) is model
        assert not model.hub_id or lookup(model.hub_id) is model


@pytest.mark.parametrize(("typo", "nearest"), [("lama-7b", "llama-7b"), ("qwen3-8bb", "qwen3-8b"), ("opt-67b", "opt")])
def test_an_unknown_name_is_refused_with_the_nearest_alias(typo: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"no model is called '{typo}'\n  try: {nearest}"):
        lookup(typo)


@pytest.mark.parametrize("name", ["", "  ", "/", "zzzzzz"])
def test_a_name_like_no_other_is_refused_with_where_names_are(name: str) -> None:
    with pytest.raises(ModelError, match="a name of qdist models"):
        lookup(name)


@pytest.mark.parametrize(
    ("hub_id", "alias"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "llama3.1-8b"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama3-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.1-70b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2-7b"),
        ("TheBloke/Llama-2-13B-chat-GPTQ", "llama2-13b"),
        ("decapoda-research/llama-7b-hf", "llama-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", "qwen2.5-0.5b"),
        ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "qwen2.5-7b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("Qwen/Qwen3-8B-AWQ", "qwen3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("bartowski/Mistral-7B-Instruct-v0.3-GGUF", "mistral-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("EleutherAI/pythia-1.4b-deduped", "pythia-1.4b"),
        ("baichuan-inc/Baichuan2-7B-Chat", "baichuan2-7b"),
        ("THUDM/glm-4-9b-hf", "glm-4-9b"),
        ("allenai/OLMo-2-1124-7B-Instruct", "olmo2-7b"),
        ("allenai/OLMo-2-1124-13B-DPO", "olmo2-13b"),
        ("allenai/OLMo-2-0425-1B-Instruct", "olmo2-1b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Base", "qwen3-30b-a3b"),
        ("Qwen/Qwen3.6-35B-A3B", "qwen3.5-35b-a3b"),
        ("unsloth/gemma-3-12b-it-bnb-4bit", "gemma3-12b"),
        ("unsloth/phi-4", "phi-4"),
        ("unsloth/gpt-oss-20b", "gpt-oss-20b"),
        ("ibm-granite/granite-3.3-8b-instruct", "granite-8b"),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral-small-24b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
    ],
)
def test_a_hub_id_has_the_shape_of_what_it_was_made_from(hub_id: str, alias: str) -> None:
    found = same_shape(hub_id)
    assert found is not None
    assert found.alias == alias
    own, facts = (from_config(config, name="") for config in (config_of(alias), found.config))
    assert (own.parameters, own.linears) == (facts.parameters, facts.linears)


@pytest.mark.parametrize(
    "hub_id",
    [
        "Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen1.5-7B-Chat", "Qwen/Qwen2.5-3B-Instruct",
        "Qwen/Qwen2.5-Coder-7B", "Qwen/Qwen2.5-7B-Instruct-1M", "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2", "TheBloke/Mistral-7B-GPTQ", "THUDM/glm-4-9b",
        "THUDM/glm-4-9b-chat-hf", "meta-llama/Llama-3.2-11B-Vision-Instruct", "meta-llama/Llama-2-7b-something",
        "gradientai/Llama-3-8B-Instruct-Gradient-1048k", "nvidia/Llama-3.1-Nemotron-70B-Instruct",
        "openlm-research/open_llama_7b", "HuggingFaceTB/SmolLM-135M", "facebook/opt-350m", "owner/unheard-of",
        "allenai/OLMo-7B-hf", "allenai/OLMo-2-7B-Instruct-something",
    ],
)  # fmt: skip
def test_another_size_generation_or_architecture_has_no_known_shape(hub_id: str) -> None:
    assert same_shape(hub_id) is None


def test_what_tuning_changed_is_in_the_configuration() -> None:
    """As their config.json have it."""
    assert same_shape("Qwen/Qwen2.5-7B-Instruct").config["max_position_embeddings"] == 32_768
    assert same_shape("Qwen/Qwen2.5-7B").config == config_of("qwen2.5-7b")


def test_every_hub_id_has_the_shape_of_its_own_alias() -> None:
    for alias, model in ALIASES.items():
        found = same_shape(model.hub_id or alias)
        assert found == (alias, model.config)


def test_every_config_gives_facts() -> None:
    for alias in ALIASES:
        assert from_config(config_of(alias), name=alias).name == alias


def test_a_config_is_a_copy() -> None:
    config = config_of("llama3.2-1b")
    config["rope_scaling"]["factor"] = 1.0
    config["hidden_size"] = 1
    assert config_of("llama3.2-1b")["rope_scaling"]["factor"] == 32.0
    assert config_of("llama3.2-1b")["hidden_size"] == 2048


def test_the_table_is_imported_in_a_few_milliseconds(tmp_path: Path) -> None:
    """Once Python has compiled it."""
    code = (
        "import time, msgspec, qdist.core.errors; start = time.process_time();"
        "import qdist.core.model.aliases; print(time.process_time() - start)"
    )
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    runs = [float(subprocess.check_output([sys.executable, "-c", code], env=environment)) for _ in range(4)]
    assert min(runs) < 0.012
