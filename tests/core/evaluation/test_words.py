"""What is typed behind --tasks."""

import pytest

from qdist.core.errors import SpecError
from qdist.core.evaluation.words import TaskWord, task_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss", [("loss", "")]),
        ("mmlu:a.jsonl", [("mmlu", "a.jsonl")]),
        ("mmlu:a.jsonl,perplexity:b.txt", [("mmlu", "a.jsonl"), ("perplexity", "b.txt")]),
        ("judge:a,b,loss", [("judge", "a,b"), ("loss", "")]),
        (" loss:a.jsonl , mmlu5:b ", [("loss", "a.jsonl"), ("mmlu5", "b")]),
        ("perplexity:s3/x:y.txt", [("perplexity", "s3/x:y.txt")]),
        ("lm:arc_easy,hellaswag", [("lm", "arc_easy,hellaswag")]),
        ("mmlu:a,other:b", [("mmlu", "a,other:b")]),
        ("loss,loss", [("loss", "")]),
    ],
)
def test_a_comma_before_no_kind_belongs_to_the_argument(text: str, words: list[tuple[str, str]]) -> None:
    assert task_words(text) == tuple(TaskWord(*word) for word in words)


@pytest.mark.parametrize(
    ("text", "message", "way"),
    [
        ("mlu:a", "no task called 'mlu'", "mmlu:FILE"),
        ("mmlu", "mmlu needs an argument", "mmlu:FILE"),
        ("loss,b.jsonl", "no task called 'b.jsonl'", "perplexity:FILE"),
        (" , ", "no task was named", "perplexity:FILE"),
    ],
)
def test_what_is_no_task_is_refused_with_one_that_is(text: str, message: str, way: str) -> None:
    with pytest.raises(SpecError) as refused:
        task_words(text)
    assert message in refused.value.message
    assert way in (refused.value.try_ or "")


def test_a_task_is_written_as_it_was_typed() -> None:
    assert [str(word) for word in task_words("judge:a,b,loss")] == ["judge:a,b", "loss"]
