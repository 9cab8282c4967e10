"""Are ratings files of other projects read as their authors meant them?"""

from typing import Any

import pytest

from qdist.core.errors import DataError
from qdist.core.evaluation.ratings import game_of, names_in

QLORA = ("13b-guanaco", "gpt-4")


@pytest.mark.parametrize(
    ("record", "score"),
    [
        ({"model1": "a", "model2": "b", "win": "model1"}, 1.0),
        ({"model1": "a", "model2": "b", "win": "b"}, 0.0),
        ({"model1": "a", "model2": "b", "win": "tie"}, 0.5),
        ({"model1": "a", "model2": "b", "score": 1}, 1.0),
        ({"model1": "a", "model2": "b", "score": 3.0}, 0.5),
        ({"model1": "a", "model2": "b", "score": [7, 8.5]}, 0.0),
        ({"model1": "a", "model2": "b", "score": [8, 8]}, 0.5),
        ({"model1": "a", "model2": "b", "score": -1}, None),
        ({"model1": "a", "model2": "b", "score": [-1, -1]}, None),
        ({"model_a": "a", "model_b": "b", "winner": "model_b"}, 0.0),
        ({"model_a": "a", "model_b": "b", "winner": "tie (bothbad)"}, 0.5),
    ],
)
def test_a_verdict_is_the_first_ones_score(record: dict[str, Any], score: float | None) -> None:
    game = game_of({"question_id": 4, **record}, where="x")
    assert (game and game.score) == score
    assert game is None or (game.first, game.second, game.question) == ("a", "b", "4")


def test_models_that_records_do_not_name_are_in_the_files_name() -> None:
    assert names_in("13b-guanaco-vs-gpt-4") == QLORA
    assert names_in("one_vs_other") == ("one", "other")
    assert names_in("canvas") is None
    game = game_of({"message_id": "m", "score": 2, "text": "..."}, where="x", names=QLORA)
    assert game is not None
    assert (game.first, game.second, game.score) == (*QLORA, 0.0)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"score": 1}, "which models"),
        ({"model1": "a", "model2": "b"}, "no verdict"),
        ({"model1": "a", "model2": "b", "win": "c"}, "'c' is not a verdict on a and b"),
    ],
)
def test_a_record_that_tells_too_little_is_named(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        game_of(record, where="f.jsonl, line 3")
    assert "f.jsonl, line 3" in caught.value.message
