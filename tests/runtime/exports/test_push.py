"""Is what goes up intact, with a card of today; and does PEFT load what the hub then holds?"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qdist.core.errors import ModelError, RunError
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.core.requests import Merge, Push
from qdist.core.telemetry.card import is_ours
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merge
from qdist.runtime.exports.push import run as push
from tests.host.hub.fake_hub import TOKEN, FakeHub, fake_hub
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run over `model` beside it."""
    folder = tmp_path_factory.mktemp("pushed")
    job = real_job(save_model(folder / "model"), save_data(folder / "d.jsonl"), folder / "run", seq_len=64)
    return adapted_run(job)[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_pushed_adapter_is_loaded_by_peft(
    run: RunDir, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(Push(run=str(run.path), repo="me/alpaca"))
    assert capsys.readouterr().out == f"{hub.address}/me/alpaca\n"
    files = hub.files["me/alpaca"]["main"]
    assert not [name for name, content in files.items() if str(run.path.parent).encode() in content]
    fetched = unpacked(files, tmp_path / "fetched")
    base = AutoModelForCausalLM.from_pretrained(run.path.parent / "model", dtype=torch.float32)
    base.resize_token_embeddings(run.plan().source.vocab_rows or base.config.vocab_size)
    loaded = PeftModel.from_pretrained(base, fetched)
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)


def test_the_card_that_goes_up_has_what_was_evaluated_since(run: RunDir, hub: FakeHub) -> None:
    result = TaskResult(task="mmlu:m.jsonl", figures=(Figure(name="accuracy", value=0.25, count=8),))
    found = Evaluation(target="r", what="adapter", results=(result,))
    (run.path / "evaluations.jsonl").write_bytes(msgspec.json.encode(found) + b"\n")
    push(Push(run=str(run.path), repo="me/alpaca"))
    text = hub.files["me/alpaca"]["main"]["README.md"].decode()
    assert "| mmlu:m.jsonl | accuracy | adapter | 0.25 |" in text
    assert is_ours(text)


def test_a_merged_model_of_a_run_goes_up(run: RunDir, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no merged model") as raised:
        push(Push(run=str(run.path), repo="me/whole", what="merged"))
    assert f"qdist merge {run.path} --out {run.path / 'merged'}" in raised.value.try_
    merge.run(Merge(runs=(str(run.path),), out=str(run.path / "merged")))
    push(Push(run=str(run.path), repo="me/whole", what="merged"))
    files = hub.files["me/whole"]["main"]
    model = AutoModelForCausalLM.from_pretrained(unpacked(files, tmp_path / "whole"), dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 2
    assert "README.md" in files


def test_what_is_broken_never_goes_up(run: RunDir, hub: FakeHub, tmp_path: Path) -> None:
    broken = unpacked({path.name: path.read_bytes() for path in run.adapter.iterdir()}, tmp_path / "broken")
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(RunError, match="does not hold the tensors that were gathered"):
        push(Push(run=str(broken), repo="me/broken"))
    merge.run(Merge(runs=(str(run.path),), out=str(tmp_path / "merged")))
    part = sorted((tmp_path / "merged").glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError):
        push(Push(run=str(tmp_path / "merged"), repo="me/broken"))
    assert hub.files == {}
