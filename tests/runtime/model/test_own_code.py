"""Is a model's own code never run, and nobody asked whether it should be?"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qdist.core.errors import ModelError
from qdist.host.sources.models import locate
from qdist.runtime.data.tokenizer import open_tokenizer
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.materialize import materialize
from tests.runtime.tiny import tiny_config

CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that brings its code along; whoever runs it leaves a mark, and whoever asks for leave gets a y."""
    model = tmp_path / "model"
    model.mkdir()
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (model / "config.json").write_text(json.dumps(tiny_config("mine") | {"auto_map": code}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": code}))
    (model / "own.py").write_text(CODE.format(marker=str(tmp_path / "mark")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return model


OPENING: dict[str, Callable[[Path], object]] = {
    "materialize": lambda folder: materialize(locate(str(folder))),
    "blueprint": blueprint,
    "tokenizer": lambda folder: open_tokenizer(folder, "it has none"),
}


@pytest.mark.parametrize("how", OPENING)
def test_a_model_that_brings_its_code_is_refused_without_a_question(
    how: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError):
        OPENING[how](folder)
    assert not (folder.parent / "mark").exists()
    assert "y/N" not in capsys.readouterr().out


def test_it_is_said_in_a_sentence_before_a_weight_is_looked_for(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model runs code out of its own repository, which qdist does not\n"):
        materialize(locate(str(folder)))


def test_a_model_of_the_hub_is_refused_when_only_its_configuration_is_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or str(folder)
    )
    with pytest.raises(ModelError, match="some/model runs code out of its own repository"):
        materialize(locate("some/model"))
    assert asked == [["config.json"]]


def test_code_beside_a_model_that_transformers_has_a_class_for_is_left_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"} | tiny_config("llama")))
    assert blueprint(materialize(locate(str(folder)))).architecture == "LlamaForCausalLM"
    assert not (folder.parent / "mark").exists()
