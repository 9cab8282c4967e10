"""Is a judge asked in both orders, read as it meant it, and believed only where it does not contradict itself?"""

import pytest

from qdist.core.evaluation.judging import (
    Said,
    Verdict,
    grade_askings,
    grade_in,
    grade_result,
    pair_askings,
    pair_result,
    said_in,
    settle,
)
from qdist.core.evaluation.predictions import Message, Prediction


def prediction(question: str, answer: str, reference: str = "") -> Prediction:
    return Prediction(prompt=(Message("user", question),), prediction=answer, reference=reference)


def verdict(question: int, names: str, said: Said) -> Verdict:
    return Verdict(key=f"{question}{names}", question=question, names=tuple(names), said=said, text="", tokens=1)


def test_each_pair_is_asked_in_both_orders_beside_each_other() -> None:
    files = {name: [prediction("2 + 2?", f"{name}0", "4"), prediction("3 + 3?", f"{name}1")] for name in "xyz"}
    askings = pair_askings(files)
    assert [(own.question, "".join(own.names)) for own in askings[:6]] == [
        (0, "xy"), (0, "yx"), (0, "xz"), (0, "zx"), (0, "yz"), (0, "zy"),
    ]  # fmt: skip
    assert len(askings) == 12
    text = askings[1].text
    assert text.index("2 + 2?") < text.index("[Start of a reference answer]\n4\n") < text.index("y0") < text.index("x0")
    assert "reference" not in askings[-1].text


def test_an_answer_of_nothing_is_shown_as_such() -> None:
    (asking,) = grade_askings("x", [prediction("Why?", "")])
    assert "[Start of the answer]\n(nothing)\n" in asking.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Both are fine.\n[[A]]", "A"),
        ("I would not say [[A]] here.\n\n[[B]]", "B"),
        ("[[C]]", "tie"),
        ("[[ tie ]]", "tie"),
        ("A is better", "unclear"),
        ("", "unclear"),
    ],
)
def test_a_verdict_is_the_last_mark(text: str, said: Said) -> None:
    assert said_in(text) == said


@pytest.mark.parametrize(
    ("text", "grade"),
    [("[[7]]", 7), ("Not [[9]] but [[6.5]]", 6.5), ("[[rating: 8/10]]", 8), ("[[11]]", None), ("8/10", None)],
)
def test_a_grade_is_the_last_mark_from_1_to_10(text: str, grade: float | None) -> None:
    assert grade_in(text) == grade


def test_orders_that_disagree_make_a_tie() -> None:
    verdicts = [
        verdict(0, "xy", "A"), verdict(0, "yx", "B"),  # x both times
        verdict(1, "xy", "A"), verdict(1, "yx", "A"),  # whoever comes first
        verdict(2, "yx", "A"), verdict(2, "xy", "B"),  # y both times
        verdict(3, "xy", "tie"), verdict(3, "yx", "tie"),
        verdict(4, "xy", "tie"), verdict(4, "yx", "A"),  # hardly y
        verdict(5, "xy", "A"), verdict(5, "yx", "unclear"),
        verdict(6, "yx", "A"),
    ]  # fmt: skip
    settled = settle(verdicts, ["x", "y"])
    assert [game.score for game in settled.games] == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert {(game.first, game.second) for game in settled.games} == {("x", "y")}
    assert (settled.disagreed, settled.unclear, settled.pending) == (2, 1, 1)
    result = pair_result("judge:x,y", ["x", "y"], settled, settings={"judge": "j"})
    assert (result.figures[0].name, result.figures[0].value, result.figures[0].count) == ("win rate of x", 0.5, 5)
    assert result.outcomes == (1.0, 0.5, 0.0, 0.5, 0.5)
    assert [figure.name for figure in result.figures[1:]] == ["Elo of x", "Elo of y"]
    assert "2 of 7 comparisons are ties because the two orders were judged differently" in result.notes
    assert "1 of 7 comparisons are left out because one order alone was asked" in result.notes


def test_a_judge_that_goes_by_order_alone_finds_nothing() -> None:
    verdicts = [verdict(number, names, "A") for number in range(30) for names in ("xy", "yx")]
    result = pair_result("judge", ["x", "y"], settle(verdicts, ["x", "y"]), settings={})
    assert result.figures[0].value == 0.5
    assert "probability of 1" in result.notes[0]


def test_who_won_all_is_told_to_have_but_the_least_distance() -> None:
    said: dict[str, Said] = {"xy": "A", "yx": "B"}
    verdicts = [verdict(n, names, own) for n in range(9) for names, own in said.items()]
    result = pair_result("judge", ["x", "y"], settle(verdicts, ["x", "y"]), settings={})
    assert result.figures[0].value == 1.0
    assert result.figures[0].low == pytest.approx(0.7, abs=0.02)
    assert any("x won every game" in note for note in result.notes)


def test_of_three_files_each_opponent_of_the_first_has_a_figure() -> None:
    said: dict[str, Said] = {"xy": "A", "yx": "B", "xz": "B", "zx": "A", "yz": "tie", "zy": "tie"}
    verdicts = [verdict(n, names, own) for n in range(4) for names, own in said.items()]
    result = pair_result("judge", ["x", "y", "z"], settle(verdicts, ["x", "y", "z"]), settings={})
    assert {name: figure.value for name, figure in result.groups.items()} == {"y": 1.0, "z": 0.0}
    assert result.figures[0].value == 0.5


def test_the_mean_grade_leaves_out_what_has_none() -> None:
    verdicts = [
        Verdict(key="", question=n, names=("x",), grade=g, text="", tokens=1) for n, g in enumerate([7, None, 9])
    ]
    result = grade_result("judge:x", verdicts, settings={})
    assert (result.figures[0].value, result.figures[0].count, result.outcomes) == (8.0, 2, (7, 9))
    assert result.notes == ("1 of 3 verdicts have no grade and are left out",)
