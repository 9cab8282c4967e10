"""Who answers the questions of a task that wants texts, and how are their tokens collected?"""

from collections.abc import Callable, Sequence

from qdist.core.errors import QdistError
from qdist.core.evaluation.scoring import CameTo
from qdist.runtime.infer.answerer import Answerer, Ended, Listener, Piece, Question


def answer_with(answerer: Answerer, questions: Sequence[Question], came_to: CameTo) -> list[list[int]]:
    """The new tokens of each answer, in the order of the questions. Raises the error that ended one.

    came_to: called with the number of answers that are whole.
    """
    tokens, errors, done = [list[int]() for _ in questions], list[QdistError](), 0

    def count(error: QdistError | None) -> None:
        nonlocal done
        done += 1
        if error:
            errors.append(error)
        came_to(done)

    for number, question in enumerate(questions):
        answerer.submit(question, _listener(tokens[number], count))
    while answerer.step() and not errors:
        pass
    if errors:
        raise errors[0]
    return tokens


def _listener(tokens: list[int], ended: Callable[[QdistError | None], None]) -> Listener:
    """Hears the tokens of one answer, and how it ended."""

    def heard(told: Piece | Ended) -> None:
        if isinstance(told, Piece):
            tokens.append(told.token)
        else:
            ended(told.error)

    return heard
