"""What is asked at a run's gate, and what it answers: one line of JSON each, followed by bytes where it says so."""

from typing import Literal

import msgspec

MOST_BYTES = 8 << 20
"""Bytes that one `append` may carry, and one reply to `list`."""


class Ask(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One request.

    store: everything after the reply goes to the store and back. hello: who is there. list: files below `path`.
    get: `length` bytes from `offset`, by default to the end. append: `size` bytes follow, which are added if the file
    has `offset` bytes. put: `size` bytes follow, which replace the file; `flush`: once they are on the disk.
    publish: the finished folder `path` gets the name `to`.
    """

    verb: Literal["store", "hello", "list", "get", "append", "put", "publish"]
    path: str = ""
    to: str = ""
    offset: int = 0
    length: int | None = None
    size: int = 0
    flush: bool = True


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer. `body` bytes follow it."""

    error: str = ""
    """Why not; empty if it is done."""
    missing: bool = False
    """Whether it failed because there is no such file."""
    size: int = 0
    """Bytes of the file: of `get` and `append`."""
    body: int = 0
    run: str = ""
    name: str = ""


class Listed(msgspec.Struct, frozen=True):
    """The bytes that follow the reply to `list`: files by path, with their sizes."""

    files: dict[str, int]
