"""Which questions of multiple choice does a file hold?"""

from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError
from qdist.core.evaluation.multiple_choice import Question, question_of
from qdist.host.data.records import read_records


def read_questions(source: str) -> list[Question]:
    """All questions of a file. Raises DataError, once, for all records that hold none."""
    bad, found = BadRecords(), list[Question]()
    for where, record in read_records(source):
        if isinstance(record, DataError):
            bad.add(record)
            continue
        try:
            found.append(question_of(record, where))
        except DataError as error:
            bad.add(error)
    bad.raise_any(len(found) + bad.count)
    return found
