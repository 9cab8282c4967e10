"""Is a comparison of models legible on a terminal?"""

from qdist.cli.views.evaluation import evaluation_lines
from tests.core.telemetry.test_evaluations import evaluation


def test_words_stand_at_the_left_and_numbers_at_the_right() -> None:
    lines = evaluation_lines([evaluation("base", 80, law=0.5), evaluation("adapter", 120, law=0.625)])
    assert lines[0] == "task             figure                    base               adapter"
    assert lines[1] == "mmlu:mmlu.jsonl  accuracy  0.4 (0.335 to 0.469)  0.6 (0.531 to 0.665)"
    assert lines[3].split() == ["task", "model", "difference", "95", "%", "interval", "by", "chance"]
    assert lines[4].startswith("mmlu:mmlu.jsonl  adapter against base        +0.2  ")
    assert lines[4].endswith("better")
    assert lines[6] == "mmlu:mmlu.jsonl"
    assert lines[8].split()[:3] == ["law", "50", "0.5"]
    assert lines[-1] == "note: mmlu:mmlu.jsonl, adapter: adapter was cut"


def test_subjects_may_be_left_out() -> None:
    assert not any("law" in line for line in evaluation_lines([evaluation("base", 80, law=0.5)], groups=False))


def test_nothing_evaluated_is_nothing_said() -> None:
    assert evaluation_lines([]) == []


def test_a_table_that_is_too_wide_is_stacked() -> None:
    lines = evaluation_lines([evaluation("base", 80, law=0.5), evaluation("adapter", 120, law=0.625)], width=60)
    assert lines[:3] == [
        "mmlu:mmlu.jsonl  accuracy",
        "  base     0.4 (0.335 to 0.469)",
        "  adapter  0.6 (0.531 to 0.665)",
    ]
    assert lines[4:6] == ["mmlu:mmlu.jsonl  adapter against base", "  difference     +0.2"]
    assert lines[8] == "                 better"
    assert max(map(len, lines)) <= 60
