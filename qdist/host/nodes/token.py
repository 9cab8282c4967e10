"""How do two nodes prove to each other that they know a run's token, without sending it?

Each side draws a nonce; both prove knowledge of the token with an HMAC over both nonces and their own role, so that a
proof can be neither replayed nor sent back to where it came from:

    gate  qdist-gate NONCE
    door  NONCE PROOF
    gate  PROOF, or REFUSED
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from qdist.core.errors import SpecError
from qdist.core.nodes.job import TOKEN, TOKEN_FILE

LEAST_CHARACTERS = 16
REFUSED = b"wrong token"
_GREETING = re.compile(rb"qdist-gate ([0-9a-f]{32})")
_ANSWER = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64})")
_MAKE = f"export {TOKEN}=$(openssl rand -hex 16), the same on every node"

Role = Literal["gate", "door"]


class Proofs(NamedTuple):
    """What one connection's two sides must send, in hexadecimal digits."""

    gate: bytes
    door: bytes


def new_token() -> str:
    """A token for one run: 128 random bits."""
    return secrets.token_hex(16)


def read_token(environ: Mapping[str, str]) -> str:
    """The run's token, from the environment or from the file that the environment names.

    Raises SpecError if there is none or both are there, if it is too short, or if others may read the file.
    """
    said, file = environ.get(TOKEN, ""), environ.get(TOKEN_FILE, "")
    if said and file:
        raise SpecError(f"{TOKEN} and {TOKEN_FILE} are both set", try_=f"unset {TOKEN}")
    if not said and not file:
        raise SpecError(f"no token for the run: neither {TOKEN} nor {TOKEN_FILE} is set", try_=_MAKE)
    token = said or _read_private(Path(file))
    if len(token) < LEAST_CHARACTERS or not token.isascii() or not token.isprintable():
        raise SpecError(
            f"the token in {TOKEN if said else file} has {len(token)} characters: at least {LEAST_CHARACTERS} of ASCII "
            "are needed",
            try_=_MAKE if said else f"openssl rand -hex 16 > {quote(file)}, and copy it to every node",
        )
    return token


def _read_private(path: Path) -> str:
    """The contents of a file that only its owner, this user, may read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SpecError(
            f"{path}, which {TOKEN_FILE} names, cannot be read: {error.strerror}", try_=f"ls -l {quote(str(path))}"
        ) from error
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SpecError(f"{path}, which {TOKEN_FILE} names, is not a file", try_=_MAKE)
        if found.st_uid != os.geteuid():
            raise SpecError(f"{path} holds a token and is another user's", try_="a copy of your own, with mode 600")
        if found.st_mode & 0o077:
            mode = f"{found.st_mode & 0o777:o}"
            raise SpecError(
                f"{path} holds a token and has mode {mode}: others may read it", try_=f"chmod 600 {quote(str(path))}"
            )
        return file.read(4096).decode(errors="replace").strip()


def proof(token: str, nonce: bytes, who: Role) -> bytes:
    """Evidence that `who` knows the token. nonce: what both sides of a connection have drawn for it."""
    return hmac.new(token.encode(), who.encode() + b" " + nonce, hashlib.sha256).digest()


def proofs(token: str, gates_nonce: bytes, doors_nonce: bytes) -> Proofs:
    """Both sides' evidence for one connection."""
    both = gates_nonce + b" " + doors_nonce
    return Proofs(proof(token, both, "gate").hex().encode(), proof(token, both, "door").hex().encode())


def draw_nonce() -> bytes:
    """A nonce: 128 random bits in hexadecimal digits."""
    return secrets.token_hex(16).encode()


def greeting(gates_nonce: bytes) -> bytes:
    """A gate's first line."""
    return b"qdist-gate " + gates_nonce


def respond(line: bytes, token: str) -> tuple[bytes, bytes]:
    """A door's answer to a gate's greeting, and the proof that the gate must then send. Raises ValueError."""
    if not (said := _GREETING.fullmatch(line)):
        raise ValueError("not the greeting of a gate")
    nonce = draw_nonce()
    expected = proofs(token, said[1], nonce)
    return nonce + b" " + expected.door, expected.gate


def verdict(line: bytes, token: str, gates_nonce: bytes) -> bytes:
    """A gate's own proof, or REFUSED for a door that does not know the token. Raises ValueError for other lines."""
    if not (said := _ANSWER.fullmatch(line)):
        raise ValueError("not the answer of a door")
    expected = proofs(token, gates_nonce, said[1])
    return expected.gate if hmac.compare_digest(expected.door, said[2]) else REFUSED


def is_proved(line: bytes, expected: bytes) -> bool:
    """Whether a gate has sent the proof that it must."""
    return hmac.compare_digest(line, expected)
