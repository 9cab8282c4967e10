"""Questions with four answers, as MMLU has them: read from records, written as prompts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qdist.core.errors import DataError

LETTERS = "ABCD"
SHOTS = 5
"""Examples before a question of `mmlu5`, at most."""
_HEAD = "The following are multiple choice questions (with answers) about "
_FORMATS = "subject, input and output (A to D), or subject, question, choices and answer (0 to 3)"


class Question(NamedTuple):
    """One question."""

    subject: str
    head: str
    """What stands before the examples and the question."""
    body: str
    """The question and its choices, up to and with `Answer:`."""
    answer: int
    """Index of the right choice."""
    split: str = ""
    """Part of the data set that the record says it is from; empty if it does not."""

    @property
    def shown(self) -> str:
        """The question with its answer: an example."""
        return f"{self.body} {LETTERS[self.answer]}"


def question_of(record: Any, where: str) -> Question:
    """The question of a record in qlora's format (subject, input, output) or the hub's (question, choices, answer).

    where: file and line, for the DataError about any other record.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is not a record with {_FORMATS}")
    subject, split = str(record.get("subject") or "all"), str(record.get("split") or "")
    if "input" in record and "output" in record:
        head, body = _divided(str(record["input"]).rstrip())
        return Question(subject, head, body, _answer(record["output"], where), split)
    choices = record.get("choices")
    if "question" in record and isinstance(choices, list) and len(choices) == len(LETTERS):
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        body = "\n".join((str(record["question"]).strip(), *lines, "Answer:"))
        head = f"{_HEAD}{subject.replace('_', ' ')}."
        return Question(subject, head, body, _answer(record.get("answer"), where), split)
    raise DataError(f"{where}: holds no question with four choices", try_=f"records with {_FORMATS}")


def _divided(text: str) -> tuple[str, str]:
    """The head, if a prompt begins with one, and the rest."""
    head, found, body = text.partition("\n\n")
    return (head, body) if found and head.startswith(_HEAD) else ("", text)


def _answer(stated: object, where: str) -> int:
    """The index that a letter or a number from 0 to 3 stands for."""
    text = str(stated).strip()
    if re.fullmatch(f"[{LETTERS}]", text):
        return LETTERS.index(text)
    if re.fullmatch("[0-3]", text):
        return int(text)
    raise DataError(
        f"{where}: the answer is {stated!r}, and not one of A to D or 0 to 3", try_=f"records with {_FORMATS}"
    )


def prompt_of(question: Question, examples: Sequence[Question] = ()) -> str:
    """The text before the answer: head, examples with their answers, question."""
    parts = (question.head, *(example.shown for example in examples), question.body)
    return "\n\n".join(filter(None, parts))


class Exam(NamedTuple):
    """The questions that are asked, and the examples of each subject."""

    questions: list[Question]
    examples: dict[str, list[Question]]


def exam_of(found: Sequence[Question], dev: Sequence[Question] = (), *, shots: int) -> Exam:
    """What to ask, and which examples to show: none if `shots` is 0.

    dev: questions that are examples alone. Without them, those of the split `dev` among `found` are, or the first
    ones of each subject; what is an example is not asked.
    """
    asked = [question for question in found if question.split != "dev"]
    if not shots:
        return Exam(asked, {})
    dev = dev or [question for question in found if question.split == "dev"]
    if dev:
        return Exam(asked, _by_subject(dev, shots))
    examples = _by_subject(asked, shots)
    taken = {id(example) for own in examples.values() for example in own}
    return Exam([question for question in asked if id(question) not in taken], examples)


def _by_subject(questions: Sequence[Question], count: int) -> dict[str, list[Question]]:
    """The first questions of each subject."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        own = found.setdefault(question.subject, [])
        if len(own) < count:
            own.append(question)
    return found
