"""Ranks answer a share each, and all have every answer."""

from types import SimpleNamespace
from typing import Any

import torch

from qdist.core.sampling import Sampling
from qdist.runtime.evaluate.placed_answers import PlacedAnswers
from qdist.runtime.infer.answerer import Question
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.infer.answering import answered, one_by_one
from tests.runtime.tiny import tiny_model

QUESTIONS = [
    Question([5, 9, 11], Sampling(max_new_tokens=6)),
    Question([7], Sampling(max_new_tokens=6)),
    Question([8, 3, 4, 2, 9], Sampling(max_new_tokens=4)),
]


def answers_on(model: Any, tokenizer: Any, questions: list[Question], *, ranks: int) -> list[list[int]]:
    """What `ranks` ranks come to, one after the other; the last of them is given what all have."""
    shares: list[dict[int, list[int]]] = []
    found: list[list[int]] = []
    for rank in reversed(range(ranks)):

        def gather(mine: dict[int, list[int]], rank: int = rank) -> list[dict[int, list[int]]]:
            shares.append(mine)
            return shares if rank == 0 else [{index: [0] for index in range(len(questions))}]

        comm: Any = SimpleNamespace(rank=rank, gather=gather)
        placed = PlacedAnswers(model, tokenizer, comm, dtype=torch.float32, ranks=ranks)
        found = placed.answer(questions, lambda count: None)
    assert sum(map(len, shares)) == len(questions)
    return found


def test_answers_do_not_depend_on_the_number_of_ranks_and_are_those_of_questions_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(bos=False)
    tokenizer.pad_token_id = 2
    alone = [found.tokens for found in answered(one_by_one(model), *QUESTIONS)]
    for ranks in (1, 2, 3):
        assert answers_on(model, tokenizer, QUESTIONS, ranks=ranks) == alone


def test_draws_are_the_same_each_time_and_leave_random_numbers_as_they_were() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(bos=False)
    tokenizer.pad_token_id = 2
    drawn = [Question([5, 9], Sampling(max_new_tokens=8, temperature=2.0, seed=seed)) for seed in (3, 4)]
    torch.manual_seed(0)
    first = answers_on(model, tokenizer, drawn, ranks=1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert answers_on(model, tokenizer, drawn, ranks=1) == first
    assert first[0] != first[1]
