"""What the readers of data files share: records in their places, and failures of files and libraries as DataErrors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from qdist.core.errors import DataError, QdistError

Record = dict[str, object]
Located = tuple[str, Record | DataError]
"""'file.jsonl:17' or 'file.json, record 3', and the record there or what is wrong with it."""

FIELDS = frozenset((
    "messages", "conversations", "conversation", "instances", "instruction", "input", "output", "prompt", "completion",
    "question", "answer", "response", "text",
))  # fmt: skip
"""Names that a record, or the header of a table, is known by where the suffix of the file says nothing."""

KINDS = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip
"""What a JSON value is called in messages."""

_LIBRARY_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    ImportError,
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Tell what the system says of a file or folder that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        if path.is_symlink():
            message = f"{path} is a link to {path.readlink()}, which does not exist"
            raise DataError(message, try_=f"ls -l {quote(str(path))}") from error
        raise DataError(f"{path} does not exist", try_=f"ls {quote(str(path.parent))}") from error
    except OSError as error:
        shown = f"ls -ld {quote(str(path))}"
        raise DataError(f"{path} cannot be read: {error.strerror or error}", try_=shown) from error


@contextmanager
def library_failures(message: str, *own: type[Exception], try_: str = "") -> Iterator[None]:
    """Tell what a library raises over foreign bytes or a bad network as `message` and its first line.

    own: base classes of the library's own exceptions. A library also lets through what its parts raise, of any built-in
    class, so there must be nothing but calls of that library inside.
    """
    failures: tuple[type[Exception], ...] = (*_LIBRARY_FAILURES, *own)
    try:
        yield
    except QdistError:
        raise
    except failures as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{message}: {reason}", try_=try_) from error
