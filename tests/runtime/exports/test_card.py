"""Do an adapter and a merged model get a card, and does a person's own card stay?"""

from pathlib import Path

import pytest
import yaml

from qdist.core.requests import Merge
from qdist.core.telemetry.card import is_ours
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merge
from qdist.runtime.train.result import gather, gather_named
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("carded")
    job = real_job(save_model(folder / "model"), save_data(folder / "d.jsonl"), folder / "run", seq_len=64)
    return adapted_run(job)[0]


def last_step(run: RunDir) -> int:
    return run.checkpoint_steps()[-1]


def test_an_adapter_has_a_card_without_places_of_this_machine(run: RunDir) -> None:
    text = (run.adapter / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation")
    assert is_ours(text)
    assert str(run.path.parent) not in text


def test_a_card_that_somebody_changed_survives_gathering(run: RunDir) -> None:
    path = run.adapter / "README.md"
    ours = path.read_text()
    path.write_text(mine := ours + "\nMy own words.\n")
    gather(run, step=last_step(run))
    assert path.read_text() == mine
    path.write_text(ours)
    gather(run, step=last_step(run))
    assert is_ours(path.read_text())


def test_an_adapter_is_written_even_if_there_can_be_no_card(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "evaluations.jsonl").write_text("{}\n")
    folder, _ = gather_named(run, "last", out=tmp_path / "adapter")
    (run.path / "evaluations.jsonl").unlink()
    assert not (folder / "README.md").exists()
    assert (folder / "adapter_config.json").exists()
    assert "note     no model card: " in capsys.readouterr().err


def test_a_merged_model_has_a_card_that_says_how_it_was_merged(run: RunDir, tmp_path: Path) -> None:
    merge.run(Merge(runs=(str(run.path),), out=str(tmp_path / "merged")))
    text = (tmp_path / "merged/README.md").read_text()
    assert "It was merged onto the dequantized weights, in bfloat16." in text
    assert is_ours(text)
    assert str(run.path.parent) not in text
