"""Answers with any model of transformers: each answer has a cache of its own, and its own pass for each token."""

from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers.generation import GenerationMode

from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.line import Answer, AtLine, Line
from qdist.runtime.infer.scheduler import Select


class _Course(NamedTuple):
    """An answer at work."""

    answer: Answer
    ids: torch.Tensor
    """All its tokens, int64 [1, tokens]."""
    state: dict[str, Any]
    """What transformers passes from one token to the next: cache, mask."""


class OneByOne(AtLine):
    """An `Answerer` for models that no decoder of rows takes: recurrences, own code, offloaded or spread layers.

    model: of transformers, without PEFT around it. slots: answers at a time; more of them are not faster, but fair.
    """

    def __init__(self, model: Any, chooser: Chooser, line: Line, *, slots: int, select: Select) -> None:
        super().__init__(line, slots)
        self._model, self._chooser, self._select = model, chooser, select
        self._selected: str | None = None
        self._courses: dict[int, _Course] = {}
        """By slot."""
        self._keeps_one = "logits_to_keep" in signature(model.forward).parameters

    @property
    def working(self) -> int:
        """Answers at work."""
        courses = tuple(self._courses.values())  # a server's metrics are read on another thread
        return sum(not course.answer.ended for course in courses)

    @torch.no_grad()
    def step(self) -> bool:
        """Let in whom there is a slot for, and bring each answer one token on; see `Answerer`."""
        self._drop_ended()
        self._let_in()
        if not self._courses:
            return False
        self._chooser.use(course.answer.question.sampling for course in self._courses.values())
        for slot in sorted(self._courses, key=lambda slot: self._courses[slot].answer.question.adapter):
            self._courses[slot] = self._advanced(slot, self._courses[slot])
        choices = self._chooser.read(max(self._courses) + 1)
        for slot, course in tuple(self._courses.items()):
            course.answer.take(choices[slot])
        self._drop_ended()
        return True

    def _let_in(self) -> None:
        free = [slot for slot in range(self.slots) if slot not in self._courses]
        for slot, answer in zip(free, self.line.admit(len(free)), strict=False):
            self._chooser.admit(slot, answer.question.sampling, answer.question.prompt)
            ids = torch.tensor([list(answer.question.prompt)], device=self._model.device)
            state: dict[str, Any] = {"use_cache": True, "attention_mask": torch.ones_like(ids)}
            mode = GenerationMode.GREEDY_SEARCH
            self._model._prepare_cache_for_generation(self._model.generation_config, state, mode, 1, self.positions)
            self._courses[slot] = _Course(answer, ids, state)

    def _advanced(self, slot: int, course: _Course) -> _Course:
        """An answer after its next token, which the chooser has chosen."""
        answer, ids, state = course
        is_first = ids.shape[1] == len(answer.question.prompt)
        if answer.question.adapter != self._selected:
            self._selected = answer.question.adapter
            self._select(self._selected)
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if is_first else 1, is_first_iteration=is_first, **state
        )
        if self._keeps_one:
            inputs["logits_to_keep"] = 1
        outputs = self._model(**inputs, return_dict=True)
        row = torch.tensor([slot], device=self._chooser.results.device)
        token = self._chooser(outputs.logits[:, -1].to(row.device, torch.float32), row)
        state = self._model._update_model_kwargs_for_generation(outputs, state)
        return _Course(answer, torch.cat((ids, token.to(ids.device)[:, None]), dim=1), state)

    def _drop_ended(self) -> None:
        for slot, course in tuple(self._courses.items()):
            if course.answer.ended:
                self.line.forget(course.answer)
                del self._courses[slot]
