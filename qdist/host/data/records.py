"""Where raw records, conversations and prompts come from: files, folders, and the hub."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

from qdist.core.data import demo
from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.reading import Reading
from qdist.core.data.records import BadRecords, asked, conversations
from qdist.core.errors import DataError, MachineError, nearest
from qdist.host.data.files import (
    SUFFIXES,
    check_file,
    file_digest,
    file_records,
    holds_records,
    read_text_lines,
    refuse_special,
)
from qdist.host.data.folders import Chosen, choose_files
from qdist.host.data.text import Located
from qdist.host.opening import readable, told

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/\s]+)?")
_WEB = re.compile(r"(https?|hf|s3|gs)://(\S+)")
_HUB_PAGE = re.compile(r"(?:huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)/?")
_VERY_CLOSE = 0.8
"""Similarity above which a name without a suffix means a local file instead of a hub data set."""


def read_records(source: str) -> Iterator[Located]:
    """The records of a file, of a folder of files, or of a hub data set ('owner/name' or 'owner/name:split').

    A record that cannot be read comes as a DataError in its place, and the next follows. Raises DataError when the
    source is missing or empty, or a file cannot be read as a whole or has no good record.
    """
    chosen = _chosen(source)
    if chosen is None:
        return _hub_records(source)
    return (located for path in chosen.files for located in file_records(path))


def check_source(source: str) -> None:
    """Raise DataError for problems visible at the beginnings of the files; a hub data set is checked later."""
    for path in (_chosen(source) or Chosen(())).files:
        check_file(path)


def source_notes(source: str) -> tuple[str, ...]:
    """Which of a folder's files are read and which are skipped; empty for a single file or a hub data set."""
    chosen, folder = _chosen(source), _path(source)
    return chosen.notes(folder) if chosen and folder.is_dir() else ()


def source_digest(source: str) -> str:
    """SHA-256 of the files' contents, or of the hub data set's name and revision: equal means equal records."""
    digest = hashlib.sha256()
    chosen = _chosen(source)
    if chosen is None:
        name, split = _hub_name(source)
        digest.update(json.dumps([name, split, _hub_revision(name)]).encode())
        return digest.hexdigest()
    for path in chosen.files:
        digest.update(f"{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path.expanduser raises for a user that there is not


def _chosen(source: str) -> Chosen | None:
    """The files that `source` names; None when it names a hub data set."""
    if not source.strip():
        raise DataError("no data was named", try_="--data FILE")
    path = _path(source)
    with readable(path, DataError):
        if path.is_dir():
            return choose_files(path)
        if path.exists() or path.is_symlink():
            refuse_special(path)
            return Chosen((path,))
        if web := _WEB.fullmatch(source):
            raise _on_the_web(source, web.group(2))
        if _means_a_file(source, path):
            raise _missing(path)
    return None


def _on_the_web(source: str, address: str) -> DataError:
    page = _HUB_PAGE.match(address)
    fetch = f"--data {page.group(1)}" if page else f"curl -LO {quote(source)}"
    return DataError(f"{source} is an address; data is a file or folder here, or owner/name on the hub", try_=fetch)


def _means_a_file(source: str, path: Path) -> bool:
    """Whether a nonexistent name was meant as a file rather than as 'owner/name' on the hub."""
    rooted = source.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(source)
    in_a_folder = path.parent != Path() and path.parent.exists()
    suffixed = path.suffix.lower() in SUFFIXES or ("/" not in source and path.suffix != "")
    return rooted or in_a_folder or suffixed or _like_a_file_here(path)


def _like_a_file_here(path: Path) -> bool:
    if path.parent != Path():
        return False
    names = [name for sibling in Path().iterdir() for name in (sibling.name, sibling.stem)]
    return bool(get_close_matches(path.name, names, n=1, cutoff=_VERY_CLOSE))


def _missing(path: Path) -> DataError:
    close = _nearest_path(path)
    if path.parent.is_dir():
        return DataError(f"{path} does not exist", try_=close or f"ls {quote(str(path.parent))}")
    if path.parent.exists():
        return DataError(f"{path} does not exist: {path.parent} is a file, not a folder", try_=str(path.parent))
    above = next(folder for folder in path.parents if folder.is_dir())
    message = f"{path} does not exist, nor does its folder {path.parent}"
    return DataError(message, try_=close or f"ls {quote(str(above))}")


def _nearest_path(path: Path) -> str:
    """An existing path with each mistyped part replaced by the closest name; empty if nothing is close."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if (found / part).exists():
            found /= part
        elif found.is_dir() and (close := nearest(part, (sibling.name for sibling in found.iterdir()))):
            found /= close
        else:
            return ""
    return str(found)


def _hub_name(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return name, split or "train"


def _hub_records(source: str) -> Iterator[Located]:
    name, split = _hub_name(source)
    with _hub(name) as datasets:
        number = 0
        for number, row in enumerate(datasets.load_dataset(name, split=split), 1):
            yield f"{source}, record {number}", dict(row)
        if not number:
            raise DataError(f"{source} holds no record", try_="another split, as in owner/name:split")


def _hub_revision(name: str) -> str:
    """Commit of a data set on the hub, or in the hub's cache without network."""
    with _hub(name) as datasets:
        return str(datasets.load_dataset_builder(name).hash)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    """The datasets package, with its errors and its HTTP client's about `name` raised as DataError."""
    try:
        import datasets
    except ImportError as error:
        message = f"{name} is no file here, and the hub needs the package datasets"
        raise MachineError(message, try_="pip install datasets") from error
    message = f"{name} is no file here, and the hub did not give it"
    with told(message, DataError, try_="a file or folder, or owner/name:split"):
        yield datasets


def read_conversations(source: str, *, data_format: str | None = None) -> Iterator[Conversation | DataError]:
    """The conversations of a source, in order, with the reason in place of each unusable record.

    Raises DataError if the source itself cannot be read.
    """
    if source == demo.NAME:
        located: Iterable[tuple[str, Any]] = (
            (f"demo, record {number}", record) for number, record in enumerate(demo.records(), 1)
        )
    else:
        located = read_records(source)
    for where, record in located:
        if isinstance(record, DataError):
            yield record
            continue
        try:
            found = conversations(record, where=where, reading=Reading(format=data_format))
        except DataError as error:
            yield error
            continue
        yield from found


def count_conversations(source: str, *, data_format: str | None = None) -> int:
    """Number of conversations. Raises DataError like `read_conversations`, and once for all unusable records."""
    bad, count = BadRecords(), 0
    for found in read_conversations(source, data_format=data_format):
        if isinstance(found, DataError):
            bad.add(found)
        count += 1
    bad.raise_any(count)
    return count


def read_prompts(path: Path) -> list[Conversation]:
    """A file's prompts: each line of a text file; each record with `prompt`, `messages` or similar of a data file.

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
