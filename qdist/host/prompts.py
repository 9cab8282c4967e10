"""Prompts from a file, read as training data is."""

from collections.abc import Iterator
from pathlib import Path

from qdist.core.bad_records import BadRecords
from qdist.core.conversation import Conversation, Turn
from qdist.core.errors import DataError
from qdist.core.records import asked
from qdist.host.record_files import holds_records, read_text_lines
from qdist.host.records import read_records


def read_prompts(path: Path) -> list[Conversation]:
    """What a file asks: of a text file each line, of data files each record with `prompt`, `messages` and their like.

    Raises DataError naming file and line; once for all prompts that cannot be used.
    """
    if not path.is_file():
        wrong = f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}"
        raise DataError(wrong, try_="a text file with one prompt a line, or JSONL with prompt or messages")
    found, bad, total = list[Conversation](), BadRecords(), 0
    for prompt in _prompts(path):
        total += 1
        if isinstance(prompt, DataError):
            bad.add(prompt)
        else:
            found.append(prompt)
    bad.raise_any(total, what="prompts")
    if not found:
        raise DataError(f"{path} holds no prompt", try_="a text file with one prompt a line")
    return found


def _prompts(path: Path) -> Iterator[Conversation | DataError]:
    if not holds_records(path):
        for where, line in read_text_lines(path):
            if line.strip():
                yield Conversation(turns=(Turn("user", line, False),), where=where)
        return
    for where, record in read_records(str(path)):
        if isinstance(record, DataError):
            yield record
            continue
        try:
            yield asked(record, where=where)
        except DataError as error:
            yield error
