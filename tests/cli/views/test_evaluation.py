"""The table of an evaluation."""

from qdist.cli.views.evaluation import evaluation_lines
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult, What


def evaluation(what: What, value: float, *, target: str = "runs/a", task: str = "mmlu:f") -> Evaluation:
    figures = (
        Figure(name="accuracy", value=value, count=3),
        Figure(name="accuracy of all questions", value=0.5, count=3),
    )
    group = Figure(name="accuracy", value=0.25, count=2, low=0.2, high=0.3)
    result = TaskResult(task=task, figures=figures, groups={"art": group}, settings={"shots": 0}, notes=("cut",))
    return Evaluation(target=target, what=what, results=(result,), where="replicate: one rank")


def test_models_stand_side_by_side() -> None:
    assert list(evaluation_lines([evaluation("base", 0.5), evaluation("adapter", 0.75)])) == [
        "mmlu:f                                          base                    adapter",
        "accuracy                                      0.5000                     0.7500",
        "accuracy of all questions                     0.5000                     0.5000",
        "  art                      0.2500 (0.2000 to 0.3000)  0.2500 (0.2000 to 0.3000)",
        "  of 3, shots 0",
        "  note: cut",
        "\nreplicate: one rank",
    ]


def test_several_targets_are_named() -> None:
    found = [
        evaluation("adapter", 0.5),
        evaluation("adapter", 0.75, target="runs/b"),
        evaluation("model", 1, target="m"),
    ]
    head = next(evaluation_lines(found))
    assert all(title in head for title in ("runs/a adapter", "runs/b adapter", "m"))


def test_other_tasks_are_a_table_of_their_own() -> None:
    lines = list(evaluation_lines([evaluation("base", 0.5), evaluation("model", 0.75, task="loss")]))
    assert [line.split()[0] for line in lines if line.startswith(("mmlu", "loss"))] == ["mmlu:f", "loss"]
