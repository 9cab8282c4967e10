"""What is a judge asked about answers, what did it say, and what do its verdicts amount to?

A judge is a model too. It favours what it reads first, so each pair is shown in both orders, and a pair on which the
two verdicts disagree is a tie (Zheng et al. 2023, section 3.4).
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from qdist.core.evaluation.elo import Game, rate, unconnected
from qdist.core.evaluation.predictions import Prediction
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.statistics import interval_of_mean, mean_of, shift_of_means
from qdist.core.spec.sections import Positive

Said = Literal["A", "B", "tie", "unclear"]
MOST_NEW_TOKENS = 1024
"""Of a verdict."""
BEST_GRADE = 10.0


class JudgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who judges, and what that may cost. The key is in the environment variable OPENAI_API_KEY."""

    judge_url: Annotated[str, Meta(description="judge: address of any server of OpenAI's protocol, to /v1.")] = (
        "https://api.openai.com/v1"
    )
    judge_model: Annotated[str | None, Meta(description="judge: name of the model that judges.")] = None
    judge_limit: Annotated[
        Positive | None, Meta(description="judge: requests at most; the rest is left for the same command again.")
    ] = None
    judge_tokens: Annotated[
        Positive | None, Meta(description="judge: tokens at most, of prompts and verdicts, by the server's count.")
    ] = None
    judge_workers: Annotated[Positive, Meta(description="judge: requests at a time.")] = 4


class Asking(NamedTuple):
    """One thing that a judge is asked."""

    question: int
    """Number of the question, from 0."""
    names: tuple[str, ...]
    """Whose answers are shown, in this order: two, or one that is to be graded."""
    system: str
    text: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a judge said, as a line of a file."""

    key: str
    """Of the judge and of every word that it was asked: the same is not asked again."""
    question: int
    names: tuple[str, ...]
    said: Said | None = None
    """Of two answers: which is better."""
    grade: float | None = None
    """Of one: from 1 to 10; None if it cannot be read."""
    text: str
    tokens: int
    """Of prompt and verdict."""


_FAIR = (
    "Judge how helpful, relevant, accurate and complete an answer is, and how well it follows what was asked. Do not "
    "let its length sway you, nor the order in which answers are shown."
)
_PAIR = (
    f"You compare two answers to a question, as an impartial judge. {_FAIR} First explain in a few sentences. Then end "
    "with a line that holds nothing but your verdict: [[A]] if the answer of assistant A is better, [[B]] if that of "
    "assistant B is, [[C]] for a tie."
)
_ONE = (
    f"You grade an answer to a question, as an impartial judge. {_FAIR} First explain in a few sentences. Then end "
    "with a line that holds nothing but your grade from 1 (useless) to 10 (as good as can be) in this form: [[5]]"
)


def pair_askings(files: Mapping[str, Sequence[Prediction]]) -> list[Asking]:
    """What to ask to compare the answers of all files, question after question, both orders beside each other.

    files: by name, with the same questions in the same order.
    """
    count = min(map(len, files.values()))
    return [
        _pair(question, ordered, files)
        for question in range(count)
        for pair in combinations(files, 2)
        for ordered in (pair, pair[::-1])
    ]


def _pair(question: int, names: tuple[str, ...], files: Mapping[str, Sequence[Prediction]]) -> Asking:
    first, second = (files[name][question] for name in names)
    text = _question(first) + _answer(first, "the answer of assistant A") + _answer(second, "the answer of assistant B")
    return Asking(question, names, _PAIR, text)


def grade_askings(name: str, predictions: Sequence[Prediction]) -> list[Asking]:
    """What to ask to have each answer of one file graded."""
    return [
        Asking(number, (name,), _ONE, _question(own) + _answer(own, "the answer"))
        for number, own in enumerate(predictions)
    ]


def _question(prediction: Prediction) -> str:
    known = _block("a reference answer", prediction.reference) if prediction.reference else ""
    return _block("the question", prediction.question) + known


def _answer(prediction: Prediction, what: str) -> str:
    return _block(what, prediction.prediction or "(nothing)")


def _block(what: str, text: str) -> str:
    return f"[Start of {what}]\n{text}\n[End of {what}]\n\n"


def said_in(text: str) -> Said:
    """Which answer a verdict prefers: the last mark counts, for an explanation may quote others."""
    marks = re.findall(r"\[\[\s*(A|B|C|tie)\s*\]\]", text, re.IGNORECASE)
    if not marks:
        return "unclear"
    last = marks[-1].upper()
    return "A" if last == "A" else "B" if last == "B" else "tie"


def grade_in(text: str) -> float | None:
    """The grade that a text ends with, 1 to 10; None if there is none."""
    marks = re.findall(r"\[\[\s*(?:rating:?\s*)?(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]\]", text, re.IGNORECASE)
    grade = float(marks[-1]) if marks else 0.0
    return grade if 1 <= grade <= BEST_GRADE else None


class Settled(NamedTuple):
    """What both orders together say."""

    games: tuple[Game, ...]
    disagreed: int
    """Pairs whose two verdicts contradict each other: ties."""
    unclear: int
    """Pairs that are left out, because a verdict cannot be read."""
    pending: int
    """Pairs of which one order alone was asked."""


def settle(verdicts: Sequence[Verdict], names: Sequence[str]) -> Settled:
    """The games of verdicts on pairs. names: of all files; of two the first of a game is the one that comes first."""
    found: dict[tuple[int, str, str], dict[str, Said]] = {}
    for own in verdicts:
        first, second = sorted(own.names, key=list(names).index)
        found.setdefault((own.question, first, second), {})[own.names[0]] = own.said or "unclear"
    games, disagreed, unclear, pending = list[Game](), 0, 0, 0
    for (question, first, second), said in found.items():
        if len(said) < 2:
            pending += 1
        elif "unclear" in said.values():
            unclear += 1
        else:
            forward, backward = _score(said[first]), 1 - _score(said[second])
            disagreed += forward != backward
            score = forward if forward == backward else 0.5
            games.append(Game(first=first, second=second, score=score, question=f"{question}"))
    return Settled(tuple(games), disagreed, unclear, pending)


def _score(said: Said) -> float:
    """Of the answer that was shown first."""
    return {"A": 1.0, "B": 0.0}.get(said, 0.5)


def pair_result(task: str, names: Sequence[str], settled: Settled, *, settings: Mapping[str, str]) -> TaskResult:
    """How often the first file wins, a tie as half a win, and the Elo ratings of all. Needs a game of the first."""
    games, against = settled.games, dict[str, list[float]]()
    for game in games:
        if game.first == names[0]:  # as it is in all that it takes part in
            against.setdefault(game.second, []).append(game.score)
    outcomes = tuple(chain.from_iterable(against.values()))
    own = _share(f"win rate of {names[0]}", outcomes)
    apart = against if len(names) > 2 else {}
    beside = {other: _share(f"win rate against {other}", scores) for other, scores in apart.items()}
    notes = (*_notes_of(settled), *_notes_of_games(games))
    shift = shift_of_means([0.5] * len(outcomes), outcomes)
    sure = () if shift is None else (f"by chance a win rate as far from 0.5 has a probability of {shift.chance:.2g}",)
    return TaskResult(
        task=task, figures=(own, *_elo_figures(games)), groups=beside, outcomes=outcomes, settings=settings,
        notes=(*sure, *notes),
    )  # fmt: skip


def elo_result(task: str, games: Sequence[Game]) -> TaskResult:
    """The ratings of all models in some games, the strongest first. Needs a game."""
    return TaskResult(task=task, figures=_elo_figures(games), notes=tuple(_notes_of_games(games)))


def grade_result(task: str, verdicts: Sequence[Verdict], *, settings: Mapping[str, str]) -> TaskResult:
    """The mean grade. Needs a grade that can be read."""
    grades = tuple(own.grade for own in verdicts if own.grade is not None)
    sure = interval_of_mean(grades)
    figure = Figure(
        name="grade", value=mean_of(grades), count=len(grades), low=sure and sure.low, high=sure and sure.high
    )
    unread = len(verdicts) - len(grades)
    notes = (f"{unread} of {len(verdicts)} verdicts have no grade and are left out",) if unread else ()
    return TaskResult(task=task, figures=(figure,), outcomes=grades, settings=settings, notes=notes)


def _share(name: str, outcomes: Sequence[float]) -> Figure:
    sure = interval_of_mean(outcomes)
    return Figure(
        name=name, value=mean_of(outcomes), count=len(outcomes), low=sure and sure.low, high=sure and sure.high
    )


def _elo_figures(games: Sequence[Game]) -> tuple[Figure, ...]:
    """Ratings, with an interval where there are several questions to draw from."""
    several = len({game.question or place for place, game in enumerate(games)}) > 1
    return tuple(
        Figure(
            name=f"Elo of {own.name}", value=own.elo, count=own.games,
            low=own.interval.low if several else None, high=own.interval.high if several else None,
        )
        for own in rate(games)
    )  # fmt: skip


def _notes_of(settled: Settled) -> list[str]:
    counts = (
        (settled.disagreed, "ties because the two orders were judged differently"),
        (settled.unclear, "left out because a verdict could not be read"),
        (settled.pending, "left out because one order alone was asked"),
    )
    whole = len(settled.games) + settled.unclear + settled.pending
    return [f"{count} of {whole} comparisons are {why}" for count, why in counts if count]


def _notes_of_games(games: Sequence[Game]) -> list[str]:
    names = sorted({name for game in games for name in (game.first, game.second)})
    notes = []
    for name in names:
        scores = {
            game.score if game.first == name else 1 - game.score for game in games if name in (game.first, game.second)
        }
        if scores in ({1.0}, {0.0}):
            how = "won" if scores == {1.0} else "lost"
            notes.append(f"{name} {how} every game: its rating and interval are but the least distance")
    if groups := unconnected(games):
        apart = " and ".join(", ".join(group) for group in groups)
        notes.append(f"no game connects {apart}: ratings of different groups cannot be compared")
    return notes
