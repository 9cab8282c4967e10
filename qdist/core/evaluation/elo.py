"""How strong are models by pairwise verdicts? Elo ratings, fitted at once, with their intervals.

Ratings are the most likely strengths of Bradley and Terry (1952), on Elo's scale: whoever is 400 above wins ten games
of eleven. Elo's own rule, game after game, rates by the order of the games, and averaging over shuffles measures that
order, not how few games there were. The intervals are the bootstrap's over questions, since the verdicts on one
question share it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

import msgspec

from qdist.core.evaluation.statistics import Interval, percentiles

MEAN = 1000.0
"""Of the ratings of all models."""
_SCALE = 400 / math.log(10)
_PRIOR = 0.2
"""Games that each is taken to have tied against one of mean strength, so that who won all has a rating too."""
_DRAWS = 1000
_MOST_BLOCKS = 250
"""Questions that are drawn one by one; more are first put together in as many blocks, at random."""
_SEED = 0
_MOST_STEPS = 100
_PRECISION = 1e-6
"""Largest last step of a fit, in natural logarithms of strengths: 0.0002 points."""
_LONGEST_STEP = 2.0


class Game(msgspec.Struct, frozen=True, kw_only=True):
    """What came of comparing the answers of two models to a question."""

    first: str
    second: str
    score: float
    """1: the first is better, 0: the second, 0.5: neither."""
    question: str = ""
    """Games of one question are drawn together; empty: a question of its own."""


class Rating(NamedTuple):
    """How strong one model is."""

    name: str
    elo: float
    interval: Interval
    """95 %."""
    games: int


class _Tally:
    """Games between each two players, and what the one with the lower number scored in them."""

    def __init__(self) -> None:
        self.games: dict[tuple[int, int], float] = {}
        self.scores: dict[tuple[int, int], float] = {}

    def add(self, pair: tuple[int, int], games: float, score: float) -> None:
        """Count more games of two players."""
        self.games[pair] = self.games.get(pair, 0.0) + games
        self.scores[pair] = self.scores.get(pair, 0.0) + score

    def join(self, other: "_Tally") -> None:
        """Count all games of another tally."""
        for pair, games in other.games.items():
            self.add(pair, games, other.scores[pair])


def rate(games: Sequence[Game]) -> tuple[Rating, ...]:
    """The rating of each model in some games, the strongest first."""
    names = sorted({name for game in games for name in (game.first, game.second)})
    numbers = {name: number for number, name in enumerate(names)}
    tallies = _by_question(games, numbers)
    strengths = _fitted(_joined(tallies), [0.0] * len(names))
    elos = _as_elo(strengths)
    drawn = [_as_elo(_fitted(sample, strengths)) for sample in _samples(tallies)]
    counts = [sum(name in (game.first, game.second) for game in games) for name in names]
    found = [
        Rating(name, elos[number], percentiles([draw[number] for draw in drawn]), counts[number])
        for name, number in numbers.items()
    ]
    return tuple(sorted(found, key=lambda rating: (-rating.elo, rating.name)))


def unconnected(games: Sequence[Game]) -> tuple[tuple[str, ...], ...]:
    """The groups of models between which there is no game, if there is more than one: they cannot be compared."""
    groups: list[set[str]] = []
    for game in games:
        own = {game.first, game.second}
        joined = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own]
        groups.append(own.union(*joined))
    return tuple(tuple(sorted(group)) for group in groups) if len(groups) > 1 else ()


def _by_question(games: Sequence[Game], numbers: Mapping[str, int]) -> list[_Tally]:
    found: dict[str | int, _Tally] = {}
    for place, game in enumerate(games):
        first, second, score = numbers[game.first], numbers[game.second], game.score
        if first > second:
            first, second, score = second, first, 1 - score
        found.setdefault(game.question or place, _Tally()).add((first, second), 1.0, score)
    tallies = list(found.values())
    if len(tallies) <= _MOST_BLOCKS:
        return tallies
    Random(_SEED).shuffle(tallies)
    return [_joined(tallies[number::_MOST_BLOCKS]) for number in range(_MOST_BLOCKS)]


def _joined(tallies: Sequence[_Tally]) -> _Tally:
    whole = _Tally()
    for tally in tallies:
        whole.join(tally)
    return whole


def _samples(tallies: Sequence[_Tally]) -> Iterator[_Tally]:
    random = Random(_SEED)
    for _ in range(_DRAWS):
        yield _joined(random.choices(tallies, k=len(tallies)))


def _as_elo(strengths: Sequence[float]) -> list[float]:
    middle = math.fsum(strengths) / len(strengths)
    return [MEAN + _SCALE * (strength - middle) for strength in strengths]


def _fitted(tally: _Tally, start: Sequence[float]) -> list[float]:
    """The most likely strengths, natural logarithms, by Newton's method."""
    strengths = list(start)
    for _ in range(_MOST_STEPS):
        steps = _solved(*_slopes(tally, strengths))
        longest = max(map(abs, steps))
        share = min(1.0, _LONGEST_STEP / longest) if longest else 1.0
        strengths = [own + share * step for own, step in zip(strengths, steps, strict=True)]
        if longest < _PRECISION:
            break
    return strengths


def _slopes(tally: _Tally, strengths: Sequence[float]) -> tuple[list[list[float]], list[float]]:
    """Of the log-likelihood: the negative of its second derivatives, and its first ones."""
    count = len(strengths)
    curvature, slope = [[0.0] * count for _ in range(count)], [0.0] * count
    for number, own in enumerate(strengths):
        expected = _probability(own)
        slope[number] += _PRIOR * (0.5 - expected)
        curvature[number][number] += _PRIOR * expected * (1 - expected)
    for (first, second), games in tally.games.items():
        expected = _probability(strengths[first] - strengths[second])
        surprise, bend = tally.scores[first, second] - games * expected, games * expected * (1 - expected)
        slope[first] += surprise
        slope[second] -= surprise
        curvature[first][first] += bend
        curvature[second][second] += bend
        curvature[first][second] -= bend
        curvature[second][first] -= bend
    return curvature, slope


def _probability(lead: float) -> float:
    return 1 / (1 + math.exp(-lead))


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of linear equations with a positive definite matrix, which is used up."""
    count = len(right)
    for pivot in range(count):
        for row in range(pivot + 1, count):
            if factor := matrix[row][pivot] / matrix[pivot][pivot]:
                for column in range(pivot, count):
                    matrix[row][column] -= factor * matrix[pivot][column]
                right[row] -= factor * right[pivot]
    found = [0.0] * count
    for row in reversed(range(count)):
        known = math.fsum(matrix[row][column] * found[column] for column in range(row + 1, count))
        found[row] = (right[row] - known) / matrix[row][row]
    return found
