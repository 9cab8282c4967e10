"""Which game does a line of a ratings file hold? Files of QLoRA's, FastChat's and the Chatbot Arena's kinds."""

import re
from collections.abc import Mapping
from typing import Any

from qdist.core.errors import DataError
from qdist.core.evaluation.elo import Game

_MODELS = (("model1", "model2"), ("model_1", "model_2"), ("model_a", "model_b"))
_VERDICTS = ("win", "winner", "score")
_QUESTIONS = ("question_id", "message_id", "prompt_id", "question")
_FIRST = ("1", "model1", "model_1", "model_a", "a")
_SECOND = ("2", "model2", "model_2", "model_b", "b")
_TIES = ("3", "0", "0.5", "tie", "tie (bothbad)", "both", "draw", "equal")
_BETWEEN = re.compile("[-_]vs[-_.]")


def names_in(stem: str) -> tuple[str, str] | None:
    """The two models that the name of a file tells, such as 13b-guanaco-vs-gpt-4."""
    parts = _BETWEEN.split(stem)
    return (parts[0], parts[1]) if len(parts) == 2 and all(parts) else None


def game_of(record: Mapping[str, Any], *, where: str, names: tuple[str, str] | None = None) -> Game | None:
    """The game of a record; None for one in which the reviewer came to no verdict (a score of -1).

    names: the models, where the records do not name them.
    Raises DataError, naming `where`, for one that has no models or no verdict.
    """
    pair = next(((record[a], record[b]) for a, b in _MODELS if a in record and b in record), names)
    if pair is None:
        raise DataError(
            f"{where}: it does not say which models it compares; keys found: {', '.join(record)}",
            try_="model1 and model2 in each record, or a file named ONE-vs-OTHER.jsonl",
        )
    first, second = map(str, pair)
    key = next((key for key in _VERDICTS if key in record), None)
    if key is None:
        raise DataError(
            f"{where}: it has no verdict; keys found: {', '.join(record)}", try_=f"one of {', '.join(_VERDICTS)}"
        )
    score = _score(record[key], first, second, where)
    question = next((str(record[key]) for key in _QUESTIONS if key in record), "")
    return None if score is None else Game(first=first, second=second, score=score, question=question)


def _score(verdict: Any, first: str, second: str, where: str) -> float | None:
    """What the first model scores. verdict: a winner in words, 1, 2 or 3 for a tie, or the scores of both."""
    if isinstance(verdict, list | tuple) and len(verdict) == 2 and all(isinstance(x, int | float) for x in verdict):
        one, other = verdict
        return None if min(verdict) < 0 else float(one > other) if one != other else 0.5
    text = f"{verdict:g}" if isinstance(verdict, float) else str(verdict).strip()
    if text == "-1":
        return None
    if text == first or text.lower() in _FIRST:
        return 1.0
    if text == second or text.lower() in _SECOND:
        return 0.0
    if text.lower() in _TIES:
        return 0.5
    raise DataError(
        f"{where}: {text[:40]!r} is not a verdict on {first} and {second}", try_="1, 2, 3 for a tie, or a model's name"
    )
