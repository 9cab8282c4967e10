"""How do the ranks of an evaluation answer questions, where each of them holds the whole model?"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qdist.core.evaluation.scoring import CameTo
from qdist.core.sampling import Sampling
from qdist.runtime.engine.torch import Comm
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.decoding import complete

_AT_A_TIME = 8
"""Answers of a batch."""


class PlacedAnswers:
    """Answers questions on all ranks together, each a share of them, by transformers' own generation.

    So no second copy of the model is read; `open_answerer` is faster, and holds a model of its own. Greedy answers do
    not depend on the number of ranks; draws do.

    model: whole, on this rank. dtype: what is computed in, where the adapter is wider.
    """

    def __init__(self, model: Any, tokenizer: Any, comm: Comm, *, dtype: torch.dtype, ranks: int) -> None:
        self._model, self._tokenizer, self._comm, self._dtype, self._ranks = model, tokenizer, comm, dtype, ranks

    def answer(self, questions: Sequence[Question], came_to: CameTo) -> list[list[int]]:
        """The new tokens of each answer, in the order of the questions, on every rank. Collective."""
        order = sorted(range(len(questions)), key=lambda index: -len(questions[index].prompt))
        alike = defaultdict[Sampling, list[int]](list)
        for index in order[self._comm.rank :: self._ranks]:
            alike[questions[index].sampling.again(-questions[index].sampling.seed)].append(index)
        mine: dict[int, list[int]] = {}
        with torch.random.fork_rng(devices=[]), self._autocast():
            for sampling, own in alike.items():
                for start in range(0, len(own), _AT_A_TIME):
                    batch = own[start : start + _AT_A_TIME]
                    mine.update(zip(batch, self._batch([questions[index] for index in batch], sampling), strict=True))
                    came_to(min(len(questions), len(mine) * self._ranks))
        found = {index: tokens for share in self._comm.gather(mine) for index, tokens in share.items()}
        return [found[index] for index in range(len(questions))]

    def _batch(self, questions: Sequence[Question], sampling: Sampling) -> list[list[int]]:
        options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
        if not sampling.is_greedy:
            torch.default_generator.manual_seed(questions[0].sampling.seed)
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
        return complete(
            self._model,
            self._tokenizer,
            [list(question.prompt) for question in questions],
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
            **options,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._model.device.type, dtype=self._dtype)
