"""Is each model asked once for each file, the base without the adapter, and are files judged without any model?"""

import json
from pathlib import Path

from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.requests import Generate
from qdist.host.evaluation.unscored import Model, evaluate_files, evaluate_models
from tests.host.evaluation.test_generation import answering, data


def test_each_model_answers_each_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text("{}")
    models = [
        Model(str(run), "base", str(run)), Model(str(run), "adapter", str(run), 7),
        Model(str(run), "merged", str(run / "merged")),
    ]  # fmt: skip
    answer, asked = answering(["It is 4.", "the end", "no"])
    file = data(tmp_path)
    usual = Generate(run="", prompts="", out="", gpus=2)
    tasks = [("mmlu", "questions.jsonl"), ("generate", file)]
    base, adapter, merged = evaluate_models(tasks, models, usual, answer=answer)
    assert [(own.run, own.adapter, own.gpus) for own in asked] == [
        (str(run), "base", 2), (str(run), "run", 2), (str(run / "merged"), "run", 2),
    ]  # fmt: skip
    assert (base.what, adapter.step, merged.target) == ("base", 7, str(run))
    assert [own.task for own in adapter.results] == [f"generate:{file}"]
    names = sorted(path.name.rpartition("-")[0] for path in (run / "predictions").iterdir())
    assert names == ["test-adapter", "test-base", "test-merged"]


def test_without_a_generate_task_no_model_is_asked() -> None:
    assert (
        list(evaluate_models([("mmlu", "x")], [Model("m", "model", "m")], Generate(run="", prompts="", out=""))) == []
    )


def test_ratings_need_no_model(tmp_path: Path) -> None:
    path = tmp_path / "ratings.jsonl"
    lines = [{"model1": "a", "model2": "b", "win": "a", "question_id": n} for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = evaluate_files([("elo", str(path)), ("mmlu", "x")], JudgeSettings())
    assert found.results[0].figures[0].name == "Elo of a"
    assert found.target == str(path)
