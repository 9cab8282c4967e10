"""Spoils the bytes of a file as strangers, disks and other programs do: a function of the bytes and a seeded generator.

Besides plain damage (cut, flipped, inserted, doubled) it knows what lies within: a value of JSON becomes one of another
kind, the header of safetensors stays whole around it, numbers of a binary header become huge.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

Form = Literal["json", "jsonl", "text", "inline", "safetensors", "binary"]
"""inline: typed on a command line, in no file that could be something else."""

_DEEP = 100_000
_RAW = "\ue000raw\ue000"
"""Stands for what json.dumps does not write, until it has written the rest."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e308, 0.5, "", " ", "x", "0", "a" * 3000,
    "\x1b[2J\x1b]0;title\x07", "\x9b31m\u202egnp.exe", "../../etc/passwd", "/dev/null", "{{ 7 * 7 }}", "%s%n",
    [], {}, [[]], [None], {"": None}, ["x"], [1, "x", None], {"type": "x"}, {"a": {"b": {"c": 1}}},
)  # fmt: skip
_RAW_VALUES = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * _DEEP + "]" * _DEEP,
    '{"a":' * _DEEP + "1" + "}" * _DEEP,
)  # fmt: skip
_CHUNKS = (
    b"\0", b"\0" * 300, b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n",
    b"\x1b[31m", b"'", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"{{", b"{%", b"=", b"#", b"\t", b"-1",
    b"NaN", b"1e999", b"9" * 400, "\u202e".encode(), "\u2028".encode(), b"null",
)  # fmt: skip
_WHOLE = (
    b"", b"\0", b"\n", b" ", b"{", b"[", b"null", b"[]", b"{}", b'""', b"0", b"true", b"\xff" * 64, b"\0" * 4096,
    b"\xef\xbb\xbf", b"\xff\xfe", b"[" * _DEEP, b'{"a":' * _DEEP, b"[" * _DEEP + b"]" * _DEEP, b"a = " + b"[" * _DEEP,
    b"a" * 100_000, b"GGUF", b"PAR1", b"ARROW1\0\0", b"\x80\x04K\x01.", b"PK\x03\x04", b"\x1f\x8b\x08",
)  # fmt: skip
_NUMBERS = (0, 1, 2**7, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NODES = ("directory", "fifo", "dangling link", "loop", "missing")
"""What may lie in a file's place that is no file."""


def spoiled(content: bytes, form: Form, random: Random) -> tuple[str, bytes]:
    """What was done, and the bytes then."""
    ways: list[Callable[[bytes, Random], bytes]] = [_cut, _flip, _insert, _drop, _double, _swap, _whole]
    if form in ("json", "jsonl", "safetensors"):
        ways += [{"json": _json, "jsonl": _jsonl, "safetensors": _header}[form]] * 8
    if form in ("binary", "safetensors"):
        ways += [_number] * 4
    way = random.choice(ways)
    return way.__name__.strip("_"), way(content, random)


def put_node(path: Path, kind: str) -> None:
    """Make what is no file at a path where nothing is."""
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path.name)


def _place(content: bytes, random: Random) -> int:
    """Beginnings and ends are where headers and footers are."""
    size = len(content)
    return min(size, random.choice((random.randint(0, size), random.randint(0, 64), size - random.randint(0, 64)))) % (
        size + 1
    )


def _cut(content: bytes, random: Random) -> bytes:
    return content[: _place(content, random)]


def _flip(content: bytes, random: Random) -> bytes:
    spoilt = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 8, 64)) if content else 0):
        spoilt[_place(content, random) % len(content)] ^= 1 << random.randrange(8)
    return bytes(spoilt)


def _insert(content: bytes, random: Random) -> bytes:
    at, chunk = _place(content, random), random.choice((*_CHUNKS, random.randbytes(random.randint(1, 40))))
    return content[:at] + chunk + content[at:]


def _drop(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + content[at + random.choice((1, 2, 8, 100)) :]


def _double(content: bytes, random: Random) -> bytes:
    start = _place(content, random)
    end = start + random.choice((1, 4, 64, 1000))
    return content[:end] + content[start:end] + content[end:]


def _swap(content: bytes, random: Random) -> bytes:
    """Lines in another order, or a line that is something else."""
    lines = content.split(b"\n")
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    lines[one], lines[other] = random.choice((lines[other], *_WHOLE)), lines[one]
    return b"\n".join(lines)


def _whole(_: bytes, random: Random) -> bytes:
    return random.choice((*_WHOLE, random.randbytes(random.randint(1, 2000))))


def _json(content: bytes, random: Random) -> bytes:
    return _with_another_value(content, random)


def _jsonl(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = _with_another_value(lines[at], random)
    return b"\n".join(lines)


def _header(content: bytes, random: Random) -> bytes:
    """safetensors with another value in its header, and the length of the header that it then has."""
    length = int.from_bytes(content[:8], "little")
    header = _with_another_value(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _number(content: bytes, random: Random) -> bytes:
    code = random.choice(("<Q", "<I", "<i"))
    number = struct.pack(code, random.choice(_NUMBERS) & (2 ** (8 * struct.calcsize(code)) - 1) >> (code == "<i"))
    at = _place(content, random)
    return content[:at] + number + content[at + len(number) :]


def _with_another_value(content: bytes, random: Random) -> bytes:
    try:
        root: list[Any] = [json.loads(content)]
    except ValueError:
        return _insert(content, random)
    holder, key = random.choice(_places(root))
    raw = random.choice(("", *_RAW_VALUES)) if random.random() < 0.3 else ""
    if not raw and isinstance(holder, dict) and random.random() < 0.2:
        holder[random.choice(("x", "", key + "x"))] = holder.pop(key)
    elif not raw and isinstance(holder, dict) and random.random() < 0.1:
        raw, holder[key] = f'1, {json.dumps(key)}: 2, "{_RAW}": 3', _RAW
    else:
        holder[key] = _RAW if raw else random.choice(_VALUES)
    return json.dumps(root[0]).replace(json.dumps(_RAW), raw or "0").encode()


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every place of a value: what holds it, and its key there."""
    found, open_ = list[tuple[Any, Any]](), list[Any]([root])
    while open_ and len(found) < 5000:
        holder = open_.pop(0)
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            found.append((holder, key))
            if isinstance(value, dict | list):
                open_.append(value)
    return found
