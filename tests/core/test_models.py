"""Which models does qdist know by a short name?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdist.core.errors import ModelError
from qdist.core.facts import from_config
from qdist.core.models import ALIASES, config_of, lookup


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
def test_a_name_like_no_other_is_refused_with_all_aliases(name: str) -> None:
    with pytest.raises(ModelError, match="smollm2-135m, llama-7b"):
        lookup(name)


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
        "import qdist.core.models; print(time.process_time() - start)"
    )
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    runs = [float(subprocess.check_output([sys.executable, "-c", code], env=environment)) for _ in range(4)]
    assert min(runs) < 0.005
