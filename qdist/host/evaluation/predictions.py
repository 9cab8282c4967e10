"""Reads what models are asked with the answers expected of them, and files of what they answered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError
from qdist.core.evaluation.elo import Game
from qdist.core.evaluation.predictions import Exchange, Message, Prediction, exchange_of
from qdist.core.evaluation.ratings import game_of, names_in
from qdist.host.data.records import read_conversations, read_records

_ANSWERS = ("prediction", "answer", "generation", "output", "response")


def read_exchanges(source: str, *, limit: int | None = None, reading: Reading = AS_FOUND) -> list[Exchange]:
    """The prompts of a file or data set, each with the answer that ends its record; the first `limit` of them.

    Raises DataError, once for all records that cannot be used, and for a source without any.
    """
    found, bad, total = list[Exchange](), BadRecords(), 0
    for conversation in read_conversations(source, reading=reading):
        total += 1
        try:
            if isinstance(conversation, DataError):
                raise conversation
            found.append(exchange_of(conversation))
        except DataError as error:
            bad.add(error)
        if total == limit:
            break
    bad.raise_any(total)
    if not found:
        raise DataError(f"{source} holds no record", try_="records with a prompt and an answer")
    return found


def read_predictions(path: Path) -> list[Prediction]:
    """The lines of a file as `qdist evaluate --tasks generate:FILE` or `qdist generate` writes it.

    Raises DataError, once for all lines that cannot be used.
    """
    found, bad = list[Prediction](), BadRecords()
    for where, record in _records(path):
        try:
            found.append(_prediction_of(record, where))
        except DataError as error:
            bad.add(error)
    bad.raise_any(len(found) + bad.count)
    return found


def _prediction_of(record: Any, where: str) -> Prediction:
    if isinstance(record, DataError):
        raise record
    answer = next((record[key] for key in _ANSWERS if isinstance(record.get(key), str)), None)
    asked = record.get("messages") or record.get("prompt")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if answer is None or not _is_dialogue(asked):
        raise DataError(
            f"{where} is not a prediction; keys found: {', '.join(record)}",
            try_='a file of generate:FILE, or {"prompt": "...", "prediction": "..."}',
        )
    figures = record.get("figures")
    return Prediction(
        prompt=tuple(Message(own["role"], own["content"]) for own in asked), prediction=answer,
        reference=_text(record, "reference"), finish=_text(record, "finish"),
        figures={key: float(value) for key, value in figures.items()} if isinstance(figures, dict) else {},
    )  # fmt: skip


def _text(record: dict[str, Any], key: str) -> str:
    """What a record has there; empty for nothing, and for what is no text."""
    found = record.get(key)
    return found if isinstance(found, str) else ""


def _is_dialogue(found: Any) -> bool:
    """Whether it is a list of turns with role and content."""
    texts = ("role", "content")
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in texts) for turn in found)
    )


def read_games(paths: list[Path]) -> tuple[list[Game], int]:
    """The games of ratings files, and how many records have no verdict.

    Raises DataError, once for all records that cannot be used, and for files without a game.
    """
    games, bad, silent = list[Game](), BadRecords(), 0
    for path in paths:
        for where, record in _records(path):
            try:
                if isinstance(record, DataError):
                    raise record
                game = game_of(record, where=where, names=names_in(path.stem))
            except DataError as error:
                bad.add(error)
            else:
                silent += game is None
                games += [game] if game else []
    bad.raise_any(len(games) + silent + bad.count)
    if not games:
        raise DataError(f"{paths[0]} holds no verdict", try_="JSONL with question_id, model1, model2 and win")
    return games, silent


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"no file {path}", try_="a JSONL file")
    return read_records(str(path))
