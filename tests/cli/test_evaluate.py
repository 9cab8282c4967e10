"""What `qdist evaluate` hands on, shows and writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdist.cli import evaluate
from qdist.cli.evaluate import _Progress
from qdist.core.errors import SpecError
from qdist.core.evaluation.asked import Asked
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.core.telemetry.events import Event

FOUND = Evaluation(
    target="runs/a",
    what="adapter",
    results=(TaskResult(task="loss", figures=(Figure(name="loss", value=1.5, count=10),)),),
    where="replicate",
)


class Invoked:
    """What came of a command line, and what it handed on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        def evaluate_all(
            asked: Asked, settings: dict[str, Any], judge: JudgeSettings, *, show: Any, say: Callable[[str], None]
        ) -> Any:
            self.asked, self.settings, self.judge = asked, settings, judge
            return [FOUND]

        monkeypatch.setattr(evaluate, "evaluate_all", evaluate_all)
        result = CliRunner().invoke(evaluate.evaluate, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.output = result.exit_code, result.stdout


def test_flags_are_what_is_asked_or_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Invoked(
        monkeypatch, "runs/a", "b", "--tasks", "loss,mmlu:f", "--beside", "base,merged", "--limit", "5", "--gpus", "2",
        "--placement", "shard", "--set", "quant.type=fp4", "--judge-model", "them",
    )  # fmt: skip
    assert ran.asked == Asked(targets=("runs/a", "b"), tasks="loss,mmlu:f", beside=("base", "merged"), limit=5)
    assert {key: str(value) for key, value in ran.settings.items()} == {
        "gpus": "2", "placement": "shard", "quant.type": "fp4",
    }  # fmt: skip
    assert ran.judge == JudgeSettings(judge_model="them")
    assert "loss" in ran.output
    assert ran.output.splitlines()[1].split() == ["loss", "loss", "1.5"]


def test_json_is_all_of_standard_output_and_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = Invoked(monkeypatch, "runs/a", "--tasks", "loss", "--json", "--out", str(tmp_path / "o.json"))
    assert json.loads(ran.output)["evaluations"][0]["results"][0]["figures"][0]["value"] == 1.5
    assert json.loads((tmp_path / "o.json").read_text()) == json.loads(ran.output)


@pytest.mark.parametrize(
    ("flags", "message"), [(["--limit", "0"], "limit"), (["--beside", "bas"], "beside"), (["--window", "x"], "window")]
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Invoked(monkeypatch, "runs/a", "--tasks", "loss", *flags)


def test_each_task_has_a_line_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with _Progress() as progress:
        progress.show([Event(kind="load"), Event(kind="scored", step=0, total_steps=4, note="loss, base", time=5.0)])
        progress.show([Event(kind="scored", step=4, total_steps=4, note="loss, base", time=7.0)])
        progress.show([Event(kind="scored", step=4, total_steps=4, note="loss, adapter", time=9.0)])
    assert capsys.readouterr().err == "  loss, base, 4 of 4 scored, 2.0/s\n  loss, adapter, 4 of 4 scored\n"
