"""Opens files from users, hubs and other programs; failures become one-sentence errors that name the file.

No caller knows a library's exceptions. Libraries raise of any class over foreign bytes, their parts' classes too
(tokenizers raises Exception itself, a panic of Rust is not even that), so they are all taken here, and here alone.
"""

import json
import os
import re
import stat
import tomllib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import msgspec

from qdist.core.errors import QdistError

T = TypeVar("T")
Kind = type[QdistError]

UTF8 = "utf-8-sig"
JSON_KINDS = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip
"""Names of JSON types in messages."""
_MARKS = (
    (BOM_UTF32_LE, "utf-32"),  # starts with the mark of UTF-16, so it is asked for first
    (BOM_UTF32_BE, "utf-32"),
    (BOM_UTF16_LE, "utf-16"),
    (BOM_UTF16_BE, "utf-16"),
)
_NODES = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONGEST_REASON = 300


@contextmanager
def told(what: str, kind: Kind, *, try_: str = "") -> Iterator[None]:
    """Raise any exception in this block as one error: `what`, a colon, and the reason.

    There must be nothing in it but calls of a library over foreign bytes: a fault of ours would be blamed on them.
    QdistErrors pass, and so does what ends the process.
    """
    try:
        yield
    except QdistError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            install = "pip install what is named there" if isinstance(error, ImportError) else ""
            raise kind(f"{what}: {reason_of(error)}", try_=install or try_) from error
        raise


def reason_of(error: BaseException) -> str:
    """Why something could not be read, in a phrase from the system or a library, without jargon."""
    match error:
        case json.JSONDecodeError():
            return f"line {error.lineno}, column {error.colno}: {error.msg.removesuffix(' at')}"
        case UnicodeDecodeError():
            return f"byte 0x{error.object[error.start]:02x} at position {error.start} is not {error.encoding.upper()}"
        case OSError() if error.strerror:
            return error.strerror
        case RecursionError():
            return "nested too deeply"
        case MemoryError():
            return "it asks for more memory than there is"
        case ValueError() if "integer string conversion" in str(error):
            return "a number of more than 4,300 digits"
        case KeyError() if error.args and " " not in str(error.args[0]):
            return f"no {error.args[0]!r}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # which quotes it
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}..."


@contextmanager
def readable(path: Path, kind: Kind, *, try_: str = "") -> Iterator[None]:
    """Report what the system says about a file or folder that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        if path.is_symlink():
            message = f"{path} is a link to {path.readlink()}, which does not exist"
            raise kind(message, try_=try_ or f"ls -l {quote(str(path))}") from error
        raise kind(f"{path} does not exist", try_=try_ or f"ls {quote(str(path.parent))}") from error
    except OSError as error:
        shown = f"ls -ld {quote(str(path))}"
        raise kind(f"{path} cannot be read: {error.strerror or error}", try_=try_ or shown) from error


def node_of(path: Path) -> str:
    """'a folder', 'a pipe', 'a device' or 'a socket'; empty for a regular file or a missing path."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return next((name for test, name in _NODES if test(mode)), "")


def require_file(path: Path, kind: Kind, *, try_: str = "") -> None:
    """Raise an error for anything but a regular file: a pipe would block, a device may never end."""
    if node := node_of(path):
        raise kind(f"{path} is {node}, not a file", try_=try_)


def require_files(folder: Path, kind: Kind, *, try_: str = "") -> None:
    """Raise an error for a pipe or device in a folder that a library will open: it would block uninterruptibly."""
    with readable(folder, kind, try_=try_):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if node_of(path) not in ("", "a folder"):
                require_file(path, kind, try_=try_)


def read_bytes(path: Path, kind: Kind, *, try_: str = "") -> bytes:
    """The whole contents of a file."""
    require_file(path, kind, try_=try_)
    with readable(path, kind, try_=try_):
        return path.read_bytes()


def encoding_of(head: bytes) -> str:
    """The encoding given by a file's byte order mark; UTF-8 without one."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), UTF8)


def read_text(path: Path, kind: Kind, *, try_: str = "") -> str:
    """The whole contents of a text file; a byte order mark selects the encoding and is dropped."""
    raw = read_bytes(path, kind, try_=try_)
    with told(f"{path} is not text", kind, try_=try_):
        return raw.decode(encoding_of(raw))


def read_value(path: Path, kind: Kind, *, try_: str = "") -> object:
    """The value in a JSON file. Refuses half of a surrogate pair, which no other file could hold."""
    text = read_text(path, kind, try_=try_)
    with told(f"{path} is not JSON", kind, try_=try_):
        found: object = json.loads(text)
        if _ESCAPED.search(text) and holds_half_pair(found):
            raise kind(f"{path} holds half of a surrogate pair, which is not a character", try_=try_)
    return found


def holds_half_pair(found: object) -> bool:
    """Whether a JSON value contains half of a surrogate pair. Raises RecursionError if nested too deeply."""
    return bool(_SURROGATE.search(json.dumps(found, ensure_ascii=False)))


def read_object(path: Path, kind: Kind, *, try_: str = "") -> dict[str, Any]:
    """The object in a JSON file."""
    found = read_value(path, kind, try_=try_)
    if not isinstance(found, dict):
        raise kind(f"{path} is not a JSON object: it holds {JSON_KINDS[type(found)]}", try_=try_)
    return found


def read_typed(path: Path, type_: type[T], kind: Kind, *, try_: str = "") -> T:
    """A JSON file of a known schema, such as those that qdist writes."""
    return decoded(read_bytes(path, kind, try_=try_), type_, str(path), kind, try_=try_)


def decoded(raw: bytes, type_: type[T], what: str, kind: Kind, *, try_: str = "") -> T:
    """JSON of a known schema. what: its origin, for errors."""
    with told(what, kind, try_=try_):
        return msgspec.json.decode(raw, type=type_)


def converted(found: object, type_: type[T], what: str, kind: Kind, *, try_: str = "") -> T:
    """Values from JSON or TOML converted to a known schema. what: their origin, for errors."""
    with told(what, kind, try_=try_):
        return msgspec.convert(found, type_)


def read_toml(path: Path, kind: Kind, *, try_: str = "") -> dict[str, Any]:
    """The contents of a TOML file."""
    text = read_text(path, kind, try_=try_)
    with told(f"{path} is not TOML", kind, try_=try_):
        return tomllib.loads(text.replace("\r\n", "\n"))
