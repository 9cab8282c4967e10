"""The records, conversations and prompts of one source: a file, a folder, a data set on the hub, or the demo."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

from qdist.core.data import demo
from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.data.records import BadRecords, asked, conversations
from qdist.core.errors import DataError, nearest
from qdist.host.data.compressed import bare_name
from qdist.host.data.files import (
    PLAIN_TEXT,
    SUFFIXES,
    check_file,
    file_digest,
    file_records,
    holds_records,
    read_text_lines,
    refuse_special,
)
from qdist.host.data.folders import Chosen, choose_files
from qdist.host.data.hub import hub_data, hub_identity, hub_records, is_known, may_be_hub_id
from qdist.host.data.text import Located
from qdist.host.opening import readable

_WEB = re.compile(r"(https?|hf|s3|gs)://(\S+)")
_HUB_PAGE = re.compile(r"(?:huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)/?")
_VERY_CLOSE = 0.8
"""Similarity above which a name without a suffix means a local file instead of a hub data set."""


def read_records(source: str) -> Iterator[Located]:
    """The records of a file, of a folder of files, of a data set on the hub, as `hub_data` takes it, or of the demo.

    A record that cannot be read comes as a DataError in its place, and the next follows. Raises DataError when the
    source is missing or empty, or a file cannot be read as a whole or has no good record.
    """
    if source == demo.NAME:
        return ((f"demo, record {number}", dict(record)) for number, record in enumerate(demo.records(), 1))
    chosen = _chosen(source)
    if chosen is None:
        return hub_records(hub_data(source))
    return (located for path in chosen.files for located in file_records(path))


def check_source(source: str) -> None:
    """Raise DataError for problems visible at the beginnings of the files; a hub data set is checked later."""
    for path in _files(source):
        check_file(path)


def source_notes(source: str) -> tuple[str, ...]:
    """Which of a folder's files are read and which are skipped, and what a known name stands for; else nothing."""
    if source == demo.NAME:
        return ()
    chosen, folder = _chosen(source), _path(source)
    if chosen is None:
        known = hub_data(source).known
        return tuple(filter(None, (f"{source} is {known.hub} on the hub" * is_known(source), known.note)))
    return chosen.notes(folder) if folder.is_dir() else ()


def source_digest(source: str) -> str:
    """SHA-256 of the files' contents, or of the hub data set's name and revision: equal means equal records."""
    digest = hashlib.sha256()
    if source == demo.NAME:
        digest.update(json.dumps(list(demo.records()), sort_keys=True).encode())
    elif _chosen(source) is None:
        digest.update(json.dumps(hub_identity(hub_data(source))).encode())
    for path in _files(source):
        digest.update(f"{file_digest(path)}\n".encode())
    return digest.hexdigest()


def is_local(source: str) -> bool:
    """Whether a source can be read without asking a hub."""
    return source == demo.NAME or os.path.lexists(_path(source))


def hub_id(source: str) -> str:
    """The id of a data set on the hub; empty for the demo and for a file or folder, which may be gone by now."""
    return "" if is_local(source) or _means_a_file(source, _path(source)) else hub_data(source).known.hub


def _files(source: str) -> tuple[Path, ...]:
    """The files that a source names; none for the demo and for a hub data set."""
    chosen = None if source == demo.NAME else _chosen(source)
    return chosen.files if chosen else ()


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
    if is_known(source):
        return False
    rooted = source.startswith(("/", ".", "~")) or not may_be_hub_id(source)
    in_a_folder = path.parent != Path() and path.parent.exists()
    bare = bare_name(path)
    known = bare != path or bare.suffix.lower() in (*SUFFIXES, PLAIN_TEXT)
    suffixed = known or ("/" not in source and path.suffix != "")
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
        elif found.is_dir() and (close := _nearest_file(part, found)):
            found /= close
        else:
            return ""
    return str(found)


def _nearest_file(name: str, folder: Path) -> str | None:
    """The file or folder with the closest name; an equal suffix alone brings no two names together."""
    stem = Path(name).stem
    return nearest(name, (there.name for there in folder.iterdir() if nearest(stem, [there.stem], alike=0.6)))


def read_conversations(source: str, *, reading: Reading = AS_FOUND) -> Iterator[Conversation | DataError]:
    """The conversations of a source, in order, with the reason in place of each unusable record.

    Raises DataError if the source itself cannot be read.
    """
    return conversations_in(read_records(source), reading_for(source, reading))


def conversations_in(located: Iterable[Located], reading: Reading) -> Iterator[Conversation | DataError]:
    """The conversations of records, in order, with the reason in place of each unusable record."""
    for where, record in located:
        if isinstance(record, DataError):
            yield record
            continue
        try:
            found = conversations(record, where=where, reading=reading)
        except DataError as error:
            yield error
            continue
        yield from found


def reading_for(source: str, reading: Reading) -> Reading:
    """How a source is read: as the user says, and where nothing is said as is known of a data set of that name."""
    if not is_known(source) or is_local(source):
        return reading
    known = hub_data(source).known.reading
    return Reading(
        format=reading.format or known.format,
        columns={**known.columns, **reading.columns},
        roles={**known.roles, **reading.roles},
    )


def read_prompts(path: Path, *, reading: Reading = AS_FOUND) -> list[Conversation]:
    """A file's prompts: each line of a text file; each record with `prompt`, `messages` or similar of a data file.

    reading: names of columns and roles.

    Raises DataError naming file and line; once for all prompts that cannot be used.
    """
    if not path.is_file():
        wrong = f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}"
        raise DataError(wrong, try_="a text file with one prompt a line, or JSONL with prompt or messages")
    found, bad, total = list[Conversation](), BadRecords(), 0
    for prompt in _prompts(path, reading):
        total += 1
        if isinstance(prompt, DataError):
            bad.add(prompt)
        else:
            found.append(prompt)
    bad.raise_any(total, what="prompts")
    if not found:
        raise DataError(f"{path} holds no prompt", try_="a text file with one prompt a line")
    return found


def _prompts(path: Path, reading: Reading) -> Iterator[Conversation | DataError]:
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
            yield asked(record, where=where, reading=reading)
        except DataError as error:
            yield error
