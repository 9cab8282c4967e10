"""Tasks: what they ask, and what answers amount to."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError, QdistError, SpecError
from qdist.core.evaluation.results import ScoredTask
from qdist.core.evaluation.scoring import Scored
from qdist.core.evaluation.words import task_words
from qdist.runtime.data.wording import usual_wording
from qdist.runtime.evaluate.tasks import Basis, open_task
from tests.runtime.data.test_tokenized import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(bos=False)


def opened(word: str, tokenizer: Any, *, limit: int | None = None, **basis: Any) -> ScoredTask:
    (parsed,) = task_words(word)
    return open_task(parsed, tokenizer, usual_wording(tokenizer), limit=limit, basis=Basis(**basis))


def scored(value: float, count: int) -> Scored:
    return Scored((value,) * count, (False,) * count)


def test_perplexity_is_over_all_tokens_alike(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello there system user " * 20)
    task = opened(f"perplexity:{text}", tokenizer, window=16)
    items = task.items()
    counts = [len(item.targets) for item in items]
    tokens = tokenizer(text.read_text())["input_ids"]
    assert sum(counts) == len(tokens) - len(items)
    result = task.result([scored(-float(1 + number % 2), count) for number, count in enumerate(counts)])
    loss = sum((1 + number % 2) * count for number, count in enumerate(counts)) / sum(counts)
    assert result.figures[0].value == pytest.approx(math.exp(loss))
    assert result.figures[0].count == sum(counts)
    assert not result.figures[0].more_is_better
    assert result.settings == {"window": 16, "stride": 16, "windows": len(items)}
    assert math.exp(
        sum(map(math.prod, zip(result.outcomes, result.weights, strict=True))) / sum(result.weights)
    ) == pytest.approx(result.figures[0].value)


def test_a_text_begins_as_the_tokenizer_begins_one(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello there")
    (item,) = opened(f"perplexity:{text}", tiny_tokenizer(bos=True)).items()
    assert item.tokens[0] == 0
    assert len(item.targets) == len(item.tokens) - 1


def test_windows_beyond_the_limit_are_told(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello there " * 40)
    task = opened(f"perplexity:{text}", tokenizer, limit=2, window=8, stride=4)
    items = task.items()
    assert [len(item.tokens) for item in items] == [8, 8]
    (note,) = task.result([scored(-1.0, len(item.targets)) for item in items]).notes
    assert note.startswith("the first 2 of ")


def test_each_record_of_text_has_windows_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    records = tmp_path / "a.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("hello there", "system user system")))
    assert len(opened(f"perplexity:{records}", tokenizer).items()) == 2


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_tokens_out_is_refused(tokenizer: Any, tmp_path: Path, stride: int) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello there")
    if stride:
        with pytest.raises(SpecError, match="stride of 9"):
            opened(f"perplexity:{text}", tokenizer, window=8, stride=stride)


def test_a_text_of_one_token_has_no_perplexity(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a")
    with pytest.raises(DataError, match="no two tokens"):
        opened(f"perplexity:{text}", tokenizer)


def test_a_loss_is_asked_of_learned_tokens_alone(tokenizer: Any, tmp_path: Path) -> None:
    records = tmp_path / "a.jsonl"
    records.write_text(json.dumps({"prompt": "hello there ", "completion": "system"}) + "\n")
    (item,) = opened(f"loss:{records}", tokenizer).items()
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("hello there ", "system"))
    assert item.targets == (*answer, tokenizer.eos_token_id)
    assert item.positions[0] == len(prompt) - 1
    result = opened(f"loss:{records}", tokenizer).result([scored(-2.0, len(item.targets))])
    assert (result.figures[0].name, result.figures[0].value) == ("loss", 2.0)


def test_a_loss_without_a_file_needs_held_out_samples(tokenizer: Any) -> None:
    with pytest.raises(SpecError, match="no held-out samples"):
        opened("loss", tokenizer)


def mmlu_file(folder: Path, count: int = 6, name: str = "mmlu.jsonl") -> Path:
    path = folder / name
    lines = [
        {"subject": "art" if number % 3 else "law", "input": f"Which {number}?\nAnswer:", "output": "ABCD"[number % 4]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answering(letter: int) -> Scored:
    return Scored(tuple(0.0 if place == letter else -5.0 for place in range(4)), (False,) * 4)


def test_the_letters_are_asked_behind_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    items = opened(f"mmlu:{mmlu_file(tmp_path)}", tokenizer).items()
    assert len(items) == 6
    for item in items:
        assert item.positions == (len(item.tokens) - 1,) * 4
        text = tokenizer.decode(item.tokens)
        assert text.endswith("Answer:")
        assert tuple(tokenizer(f"{text}{letter}")["input_ids"][-1] for letter in "ABCD") == item.targets


def test_accuracy_is_the_mean_of_the_subjects(tokenizer: Any, tmp_path: Path) -> None:
    task = opened(f"mmlu:{mmlu_file(tmp_path)}", tokenizer)
    result = task.result([answering(number) for number in (0, 1, 2, 0, 0, 0)])  # right: A B C D A B
    # law has questions 0 and 3, art the others
    assert {name: figure.value for name, figure in result.groups.items()} == {"art": 0.75, "law": 0.5}
    assert [figure.value for figure in result.figures] == [0.625, pytest.approx(4 / 6)]
    mean = sum(map(math.prod, zip(result.outcomes, result.weights, strict=True))) / sum(result.weights)
    assert mean == pytest.approx(0.625)
    assert result.settings == {"shots": 0, "subjects": 2}


def test_questions_beyond_the_limit_are_told(tokenizer: Any, tmp_path: Path) -> None:
    task = opened(f"mmlu:{mmlu_file(tmp_path)}", tokenizer, limit=2)
    assert task.result([answering(0)] * 2).notes == ("the first 2 of 6 questions",)
    assert opened(f"mmlu:{mmlu_file(tmp_path)}", tokenizer, limit=6).result([answering(0)] * 6).notes == ()


def test_five_examples_are_shown_of_a_dev_file_beside(tokenizer: Any, tmp_path: Path) -> None:
    path = mmlu_file(tmp_path, 2)
    mmlu_file(tmp_path, 12, "dev.jsonl")
    law, _ = opened(f"mmlu5:{path}", tokenizer).items()
    text = tokenizer.decode(law.tokens)
    assert text.count("Answer: ") == 4
    assert text.startswith("Which 0?\nAnswer: A\n\nWhich 3?\nAnswer: D\n\n")


def test_examples_are_left_out_where_a_prompt_is_too_long(tokenizer: Any, tmp_path: Path) -> None:
    path = mmlu_file(tmp_path, 14)
    task = opened(f"mmlu5:{path}", tokenizer, longest=60)
    items = task.items()
    assert all(len(item.tokens) <= 60 for item in items)
    assert "Which 1?" in tokenizer.decode(items[-1].tokens)
    (note,) = task.result([answering(0)] * len(items)).notes
    assert "shortened to 60 tokens" in note


def test_a_file_without_questions_is_refused_by_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no question"}\n')
    with pytest.raises(QdistError, match=r"a\.jsonl"):
        opened(f"mmlu:{path}", tokenizer)
