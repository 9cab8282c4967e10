"""MMLU: which of the letters A to D does a model find most probable behind a question?"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

from qdist.core.errors import DataError
from qdist.core.evaluation.multiple_choice import LETTERS, Exam, Question, prompt_of
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.scoring import Item, Scored
from qdist.core.text import counted
from qdist.runtime.data.encode import opening

_BETWEEN = (" ", "")
"""What may stand between a prompt and its answer."""


class Mmlu:
    """Accuracy by subject, their mean, and that over all questions."""

    def __init__(
        self, name: str, exam: Exam, tokenizer: Any, *, longest: int, shots: int, notes: tuple[str, ...] = ()
    ) -> None:
        """longest: tokens of a prompt; longer ones lose examples, then their beginning.

        Raises DataError where there is nothing to ask, or the letters are not single tokens behind a prompt.
        """
        if not exam.questions:
            raise DataError(f"{name}: there is no question left beside the examples", try_="a file with more questions")
        self.name, self._exam, self._tokenizer, self._longest, self._shots = name, exam, tokenizer, longest, shots
        self._notes = notes
        self._opening = opening(tokenizer)
        self._letters = _letter_tokens(tokenizer, prompt_of(exam.questions[0]), name)
        self._shortened = 0

    def items(self) -> list[Item]:
        """A prompt for each question, the four letters asked at its last token."""
        return self._asked

    @cached_property
    def _asked(self) -> list[Item]:
        return [self._item(question) for question in self._exam.questions]

    def _item(self, question: Question) -> Item:
        examples: Sequence[Question] = self._exam.examples.get(question.subject, ())
        tokens = self._tokens(question, examples)
        self._shortened += len(tokens) > self._longest
        while len(tokens) > self._longest and examples:
            examples = examples[:-1]
            tokens = self._tokens(question, examples)
        tokens = tokens[-self._longest :]
        return Item(tuple(tokens), (len(tokens) - 1,) * len(LETTERS), self._letters)

    def _tokens(self, question: Question, examples: Sequence[Question]) -> list[int]:
        text = prompt_of(question, examples)
        return [*self._opening, *self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def result(self, scored: list[Scored]) -> TaskResult:
        """Accuracies. An outcome is 1 for a right answer; weights make their mean that of the subjects."""
        right = [
            float(max(range(len(LETTERS)), key=own.logprobs.__getitem__) == question.answer)
            for own, question in zip(scored, self._exam.questions, strict=True)
        ]
        by_subject: dict[str, list[float]] = {}
        for outcome, question in zip(right, self._exam.questions, strict=True):
            by_subject.setdefault(question.subject, []).append(outcome)
        groups = {subject: _accuracy("accuracy", own) for subject, own in sorted(by_subject.items())}
        macro = fmean(figure.value for figure in groups.values())
        return TaskResult(
            task=self.name,
            figures=(
                Figure(name="accuracy", value=macro, count=len(right)),
                _accuracy("accuracy of all questions", right),
            ),
            groups=groups,
            outcomes=tuple(right),
            weights=_weights(self._exam.questions, by_subject),
            settings={"shots": self._shots, "subjects": len(groups)},
            notes=(*self._notes, *self._told_of_shortened()),
        )

    def _told_of_shortened(self) -> Iterator[str]:
        if self._shortened:
            yield f"{counted(self._shortened, 'prompt')} shortened to {self._longest:,} tokens"


def _accuracy(name: str, outcomes: Sequence[float]) -> Figure:
    return Figure(name=name, value=fmean(outcomes), count=len(outcomes))


def _weights(questions: Sequence[Question], by_subject: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    """The weight of each question in the mean of the subjects; they add up to the number of questions."""
    share = len(questions) / len(by_subject)
    return tuple(share / len(by_subject[question.subject]) for question in questions)


def _letter_tokens(tokenizer: Any, prompt: str, name: str) -> tuple[int, ...]:
    """The token that each letter becomes behind a prompt: with a space before it, or else without."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for between in _BETWEEN:
        whole = [tokenizer(f"{prompt}{between}{letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS]
        if all(tokens[:-1] == before for tokens in whole) and len({tokens[-1] for tokens in whole}) == len(LETTERS):
            return tuple(tokens[-1] for tokens in whole)
    raise DataError(
        f"{name}: behind 'Answer:' the letters A to D are not single tokens of this tokenizer", try_="another task"
    )
