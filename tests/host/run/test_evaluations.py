"""Are evaluations kept a line each, whatever a kill left behind?"""

from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.host.run.evaluations import add_evaluation, read_evaluations


def evaluation(value: float) -> Evaluation:
    result = TaskResult(task="mmlu:FILE", figures=(Figure(name="accuracy", value=value, count=4),), outcomes=(1.0, 0.0))
    return Evaluation(target="runs/1", what="adapter", results=(result,), step=5, time=1.0)


def test_what_is_added_is_read(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == ()
    add_evaluation(tmp_path, evaluation(0.5))
    add_evaluation(tmp_path, evaluation(0.75))
    assert read_evaluations(tmp_path) == (evaluation(0.5), evaluation(0.75))


def test_a_line_that_a_kill_left_is_not_read_and_makes_way(tmp_path: Path) -> None:
    add_evaluation(tmp_path, evaluation(0.5))
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes() + b'{"target":"ru')
    assert read_evaluations(tmp_path) == (evaluation(0.5),)
    add_evaluation(tmp_path, evaluation(0.75))
    assert read_evaluations(tmp_path) == (evaluation(0.5), evaluation(0.75))


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(RunError, match=r"evaluations\.jsonl, line 1"):
        read_evaluations(tmp_path)
