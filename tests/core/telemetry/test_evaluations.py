"""Does a person read who is better, by how much, and how sure that is?"""

from qdist.core.evaluation.results import Evaluation, Figure, TaskResult, What
from qdist.core.telemetry.evaluations import evaluation_tables, in_words, shortened

TASK = "mmlu:/data/tests/mmlu.jsonl"


def evaluation(what: What, right: int, **groups: float) -> Evaluation:
    result = TaskResult(
        task=TASK,
        figures=(Figure(name="accuracy", value=right / 200, count=200),),
        groups={name: Figure(name="accuracy", value=value, count=50) for name, value in groups.items()},
        outcomes=(1.0,) * right + (0.0,) * (200 - right),
        settings={"shots": 0},
        notes=(f"{what} was cut",),
    )
    return Evaluation(target="runs/1", what=what, results=(result,))


def test_models_stand_side_by_side_with_intervals_and_a_word() -> None:
    tables = evaluation_tables([evaluation("adapter", 120), evaluation("merged", 81), evaluation("base", 80)])
    assert tables.figures.headers == ("task", "figure", "base", "adapter", "merged")
    (row,) = tables.figures.rows
    assert row[:3] == ("mmlu:mmlu.jsonl", "accuracy", "0.4 (0.335 to 0.469)")
    better, same = tables.differences.rows
    assert (better[1], better[2], better[4:]) == ("adapter against base", "+0.2", ("below 0.001", "better"))
    assert (same[1], same[-1]) == ("merged against base", "no difference beyond chance")
    assert tables.notes == (
        "mmlu:mmlu.jsonl: shots 0", "mmlu:mmlu.jsonl, base: base was cut", "mmlu:mmlu.jsonl, adapter: adapter was cut",
        "mmlu:mmlu.jsonl, merged: merged was cut",
    )  # fmt: skip


def test_each_subject_has_a_row() -> None:
    tables = evaluation_tables([evaluation("base", 80, law=0.5, physics=0.25), evaluation("adapter", 90, law=0.75)])
    ((task, table),) = tables.groups
    assert (task, table.headers) == ("mmlu:mmlu.jsonl", ("", "of", "base", "adapter"))
    assert [row[:2] for row in table.rows] == [("law", "50"), ("physics", "50")]
    assert table.rows[1][3] == "-"


def test_one_model_has_no_differences() -> None:
    assert evaluation_tables([evaluation("base", 80)]).differences.rows == ()


def test_a_note_on_the_only_model_does_not_name_it() -> None:
    assert evaluation_tables([evaluation("base", 80)]).notes[1] == "mmlu:mmlu.jsonl: base was cut"


def test_a_figure_without_an_interval_stands_alone() -> None:
    assert in_words(Figure(name="loss", value=2.0, count=3)) == "2"
    assert in_words(None) == "-"


def test_files_are_named_without_their_folders() -> None:
    assert shortened("judge:runs/1/a.jsonl,/data/b.jsonl") == "judge:a.jsonl,b.jsonl"
    assert shortened("lm:arc_easy") == "lm:arc_easy"
