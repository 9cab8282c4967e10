"""Is an evaluation refused, before anything is started, for tasks that lack something and for flags that none uses?"""

import json
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import SpecError
from qdist.core.evaluation.asked import Asked
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.evaluation.results import Evaluation
from qdist.core.evaluation.words import KINDS
from qdist.core.spec.sections import OF_FILES, OF_MODELS
from qdist.host.launch.evaluating import evaluate


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    games = [{"model1": "x", "model2": "y", "win": "x", "question_id": number} for number in range(4)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(game) + "\n" for game in games))


def evaluated(
    asked: Asked, settings: dict[str, Any] | None = None, judge: JudgeSettings | None = None
) -> list[Evaluation]:
    return evaluate(
        asked, settings or {}, judge or JudgeSettings(), show=lambda events: None, say=lambda line: None,
        backend=lambda own: pytest.fail("ranks were started"),
    )  # fmt: skip


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("tasks", "asked", "settings", "message"),
    [
        ("mmlu:a.jsonl", {}, {}, "mmlu:a.jsonl is asked of a model, and none is named"),
        ("elo:a.jsonl", {"targets": ("m",)}, {}, "elo:a.jsonl is of files, which m has no part in"),
        ("judge:a.jsonl,b.jsonl", {}, {}, "judge: asks a model, and none is named"),
        ("generate:a.jsonl", {"targets": ("m",)}, {"placement": "shard"}, "placement is not for that"),
        ("generate:a.jsonl", {"targets": ("m",)}, {"gpus": 2}, "--gpus 2 counts GPUs, and this machine has none"),
        ("elo:a.jsonl", {}, {"gpus": 2}, "gpus is of models, and elo:a.jsonl asks none"),
        ("elo:a.jsonl", {"limit": 2}, {}, "--limit is of"),
        ("elo:a.jsonl", {"beside": ("base",)}, {}, "--beside is of"),
        ("mmlu:a.jsonl", {"targets": ("m",), "window": 8}, {}, "--window is of perplexity, and the tasks are mmlu"),
        ("mmlu:a.jsonl", {"targets": ("m",), "stride": 8}, {}, "--stride is of perplexity"),
        ("mmlu:a.jsonl", {"targets": ("m",), "chat": True}, {}, "--chat is of lm"),
        ("mmlu:a.jsonl", {"targets": ("m",), "max_new_tokens": 8}, {}, "--max-new-tokens is of generate"),
        ("mmlu:a.jsonl", {"targets": ("m",), "batch": 2}, {}, "--batch is of generate"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tasks: str, asked: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        evaluated(Asked(tasks=tasks, **asked), settings)


@pytest.mark.usefixtures("files")
def test_settings_of_a_judge_are_for_a_judge() -> None:
    with pytest.raises(SpecError, match="--judge-workers is of judge, and the tasks are elo"):
        evaluated(Asked(tasks="elo:a.jsonl"), judge=JudgeSettings(judge_workers=2))


@pytest.mark.usefixtures("files")
def test_ratings_need_no_model_and_start_nothing() -> None:
    (found,) = evaluated(Asked(tasks="elo:a.jsonl"))
    assert found.results[0].figures[0].name == "Elo of x"


def test_tasks_of_answers_are_among_the_kinds() -> None:
    assert {*OF_MODELS, *OF_FILES} < set(KINDS)
