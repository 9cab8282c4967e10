"""Are answers measured against the ones in the data, written with them, and given once only?"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError, RunError
from qdist.core.requests import Generate
from qdist.host.evaluation.generation import run_generate
from qdist.host.evaluation.predictions import read_exchanges, read_predictions

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "2 and 2", "output": "It is 4."},
    {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": " the end "},
    ]},
    {"prompt": "Say no", "completion": "no"},
]  # fmt: skip


def data(folder: Path, records: list[dict[str, Any]] = RECORDS) -> str:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def answering(answers: list[str]) -> tuple[Callable[[Generate], None], list[Generate]]:
    """What answers as `qdist generate` does, and the requests that it got."""
    asked: list[Generate] = []

    def answer(request: Generate) -> None:
        asked.append(request)
        exchanges = read_exchanges(request.prompts, limit=request.limit)
        lines = [
            {
                "messages": [{"role": turn.role, "content": turn.said} for turn in own.prompt.turns],
                "answer": text, "finish": "length" if text == "cut" else "stop", "reference": own.reference,
            }
            for own, text in zip(exchanges, answers, strict=False)
        ]  # fmt: skip
        Path(request.out).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return answer, asked


def test_the_last_turn_is_the_reference_and_all_before_it_is_asked(tmp_path: Path) -> None:
    exchanges = read_exchanges(data(tmp_path))
    assert [own.reference for own in exchanges] == ["It is 4.", "the end", "no"]
    assert [[turn.role for turn in own.prompt.turns] for own in exchanges] == [
        ["user"], ["system", "user", "assistant", "user"], ["user"],
    ]  # fmt: skip
    assert exchanges[0].prompt.turns[0].extra == "2 and 2"
    assert not any(own.prompt.learns for own in exchanges)
    assert len(read_exchanges(data(tmp_path), limit=2)) == 2


def test_answers_are_measured_and_written_beside_what_was_expected(tmp_path: Path) -> None:
    out = tmp_path / "predictions.jsonl"
    answer, asked = answering(["It is 4.", "", "cut"])
    result = run_generate(Generate(run="model", prompts=data(tmp_path), out=str(out)), answer=answer)
    assert [own.references for own in asked] == [True]
    figures = {figure.name: figure for figure in result.figures}
    assert list(figures) == ["rougeL", "rouge1", "rouge2", "bleu"]
    assert figures["rougeL"].value == pytest.approx(1 / 3)
    assert result.outcomes == (1.0, 0.0, 0.0)
    first = read_predictions(out)[0]
    assert (first.question, first.reference, first.prediction) == ("Add.\n\n2 and 2", "It is 4.", "It is 4.")
    assert first.figures["rouge1"] == 1.0
    assert "1 of 3 answers were cut at 256 tokens or the model's end" in result.notes
    assert "1 of 3 answers are empty" in result.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl", "test.jsonl"]


def test_what_was_answered_is_measured_without_answering_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer, asked = answering(["It is 4.", "the end", "yes"])
    request = Generate(run="some/model", prompts=data(tmp_path), out="")
    first = run_generate(request, answer=answer)
    assert run_generate(request, answer=answer) == first
    assert len(asked) == 1
    (written,) = (tmp_path / "predictions").glob("*.jsonl")
    assert written.name.startswith("test-model-")
    limited = Generate(run="some/model", prompts=request.prompts, out="", limit=2)
    assert run_generate(limited, answer=answer).figures[0].count == 2
    data(tmp_path, [*RECORDS, RECORDS[0]])
    run_generate(request, answer=answer)
    assert len(asked) == 3


def test_a_model_that_was_merged_anew_answers_anew(tmp_path: Path) -> None:
    merged, (answer, asked) = tmp_path / "merged", answering(["It is 4.", "the end", "yes"])
    merged.mkdir()
    request = Generate(run=str(merged), prompts=data(tmp_path), out="")
    for time_ns in (1, 1, 2):
        weights = merged / "model.safetensors"
        weights.write_bytes(b"")
        os.utime(weights, ns=(time_ns, time_ns))
        run_generate(request, folder=tmp_path / "predictions", answer=answer)
    assert len(asked) == 2


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    with pytest.raises(RunError, match="exists"):
        run_generate(Generate(run="model", prompts=data(tmp_path), out=str(out)), answer=answering([])[0])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "Once upon a time."}, "nothing is asked"),
        ({"messages": [*RECORDS[1]["messages"], {"role": "user", "content": "?"}]}, "last turn is the user's"),
    ],
)
def test_records_without_a_question_or_an_answer_are_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_exchanges(data(tmp_path, [*RECORDS, record]))
    assert "test.jsonl:4" in caught.value.message
