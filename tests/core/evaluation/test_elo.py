"""Do ratings show the ranking that the games were made from, whatever their order?"""

from random import Random

import pytest

from qdist.core.evaluation.elo import MEAN, Game, rate, unconnected
from qdist.core.evaluation.judging import elo_result

TRUTH = {"guanaco-65b": 1150.0, "guanaco-33b": 1080.0, "vicuna-13b": 1000.0, "alpaca-13b": 920.0, "base": 850.0}


def games_of(truth: dict[str, float], questions: int, *, seed: int = 0) -> list[Game]:
    """Games that end as often for each as its strength says; a fifth of what is undecided in that are ties."""
    random, names = Random(seed), list(truth)
    games = []
    for question in range(questions):
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                share = 1 / (1 + 10 ** ((truth[second] - truth[first]) / 400))
                ties = 0.4 * min(share, 1 - share)
                draw = random.random()
                score = 0.5 if draw < ties else float(draw < ties / 2 + share)
                games.append(Game(first=first, second=second, score=score, question=str(question)))
    return games


def test_a_known_ranking_is_found_and_held_by_the_intervals() -> None:
    ratings = rate(games_of(TRUTH, 120))
    assert [rating.name for rating in ratings] == list(TRUTH)
    assert all(rating.interval.low <= TRUTH[rating.name] <= rating.interval.high for rating in ratings)
    assert all(rating.interval.low < rating.elo < rating.interval.high for rating in ratings)
    assert {rating.games for rating in ratings} == {480}


def test_the_order_of_games_and_of_their_sides_changes_nothing() -> None:
    games = games_of(TRUTH, 20)
    turned = [
        Game(first=own.second, second=own.first, score=1 - own.score, question=own.question) for own in reversed(games)
    ]
    assert [(r.name, round(r.elo, 3)) for r in rate(games)] == [(r.name, round(r.elo, 3)) for r in rate(turned)]


def test_ten_wins_of_eleven_are_400_points() -> None:
    games = [Game(first="a", second="b", score=float(number % 11 > 0)) for number in range(1100)]
    first, second = rate(games)
    assert first.elo - second.elo == pytest.approx(400, abs=1)
    assert (first.elo + second.elo) / 2 == pytest.approx(MEAN)


def test_who_won_every_game_has_a_rating() -> None:
    first, second = rate([Game(first="a", second="b", score=1.0)] * 5)
    assert first.name == "a"
    assert 200 < first.elo - second.elo < 2000


def test_more_questions_narrow_the_intervals() -> None:
    wide, narrow = (rate(games_of(TRUTH, count))[0].interval for count in (25, 400))
    assert narrow.high - narrow.low < 0.4 * (wide.high - wide.low)


def test_models_between_which_no_game_was_are_told() -> None:
    games = [Game(first=a, second=b, score=1.0) for a, b in ("ab", "cd", "bc", "xy")]
    assert unconnected(games) == (("a", "b", "c", "d"), ("x", "y"))
    assert unconnected(games[:3]) == ()


@pytest.mark.parametrize(("questions", "sure"), [(1, False), (2, True)])
def test_ratings_of_a_single_question_have_no_interval(questions: int, sure: bool) -> None:
    games = [Game(first="a", second="b", score=0.5, question=str(number)) for number in range(questions) for _ in "xy"]
    assert [figure.low is not None for figure in elo_result("elo:f", games).figures] == [sure, sure]
