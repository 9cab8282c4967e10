"""Is a model's own code run only where that was asked for in words, and then wherever the model is opened?"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qdist.core.errors import ModelError
from qdist.core.requests import Merge
from qdist.core.telemetry.events import losses
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.host.sources.models import locate
from qdist.runtime.data.tokenizer import open_tokenizer
from qdist.runtime.exports.merge import merge
from qdist.runtime.infer.load import load
from qdist.runtime.infer.plain import open_plain
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.materialize import materialize, trust
from tests.runtime.tiny import logits_of, real_job, save_data, save_model, tiny_config

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
    with pytest.raises(ModelError, match=r"model: Python files out of its own repository compute it") as caught:
        materialize(locate(str(folder)))
    assert caught.value.try_.startswith("--trust-remote-code")


def test_a_model_of_the_hub_is_refused_when_only_its_configuration_is_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or str(folder)
    )
    with pytest.raises(ModelError, match="no class for some/model: Python files"):
        materialize(locate("some/model"))
    assert asked == [["config.json"]]


def test_code_beside_a_model_that_transformers_has_a_class_for_is_left_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"} | tiny_config("llama")))
    assert blueprint(materialize(locate(str(folder)))).architecture == "LlamaForCausalLM"
    assert not (folder.parent / "mark").exists()


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Config(LlamaConfig):
    model_type = "of_its_own"


class Model(LlamaForCausalLM):
    config_class = Config

    def forward(self, *given, **named):
        answer = LlamaForCausalLM.forward(self, *given, **named)
        answer.logits = answer.logits * 0.5
        return answer


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code goes to a folder of this test, and transformers forgets it afterwards."""
    from transformers import dynamic_module_utils
    from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    mappings = (
        configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        tokenization_auto.TOKENIZER_MAPPING,
    )  # fmt: skip
    for mapping in mappings:
        monkeypatch.setattr(mapping, "_extra_content", {})
    monkeypatch.setattr(tokenization_auto, "REGISTERED_TOKENIZER_CLASSES", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Llama that halves its logits, in a file of its own, with its tokenizer."""
    model = save_model(tmp_path / "own")
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(model / "config.json", model_type="of_its_own", architectures=["Model"], auto_map=code)
    tokenizer = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    change(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    (model / "own.py").write_text(OWN)
    save_data(tmp_path / "data.jsonl")
    return model


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.usefixtures("modules")
def test_asked_for_it_runs_in_every_process_of_a_run_and_is_recorded(
    train: Callable[[prepare.Launch], RunDir], own: Path
) -> None:
    data, settings = own.parent / "data.jsonl", {"steps": 2, "gpus": 1, "dtype": "float32"}
    with pytest.raises(ModelError, match="would run on this machine with all your rights"):
        real_job(own, data, own.parent / "refused", **settings)
    job = real_job(own, data, own.parent / "run", trust_remote_code=True, **settings)
    assert (job.plan.source.own_code, job.plan.facts.family) == (str(own), "of_its_own")
    run = train(job)
    assert len(losses([event for event in Follower(run.path).new_events() if event.rank == 0])) == 2
    assert (run.result() or {})["own_code"] == str(own)
    adapted, tokenizer = load(run.path, device="cpu")
    assert type(tokenizer).__name__ == "OwnTokenizer"
    out = own.parent / "merged"
    merge(Merge(runs=(str(run.path),), out=str(out)))
    assert (out / "own.py").read_text() == OWN
    trust(str(out))
    merged = open_plain(str(out), "float32", "cpu", None, tokens=2048).model
    assert type(merged).__name__ == "Model"
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=0.05, rtol=0.05)
