"""Who may read a run's token, and what proves that one knows it?"""

from pathlib import Path

import pytest

from qdist.core.errors import SpecError
from qdist.host.nodes.token import (
    REFUSED,
    draw_nonce,
    greeting,
    is_proved,
    new_token,
    proofs,
    read_token,
    respond,
    verdict,
)

TOKEN = "0123456789abcdef"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    path = tmp_path / "a token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


def test_a_token_is_read_from_the_environment_or_from_a_private_file(private: Path) -> None:
    assert read_token({"QDIST_TOKEN": TOKEN}) == TOKEN
    assert read_token({"QDIST_TOKEN_FILE": str(private)}) == TOKEN


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "neither QDIST_TOKEN nor QDIST_TOKEN_FILE is set"),
        ({"QDIST_TOKEN": "short"}, "has 5 characters: at least 16"),
        ({"QDIST_TOKEN": "ein schöner langer Text"}, "of ASCII"),
        ({"QDIST_TOKEN": TOKEN, "QDIST_TOKEN_FILE": "f"}, "are both set"),
        ({"QDIST_TOKEN_FILE": "/nowhere/token"}, "cannot be read: No such file"),
        ({"QDIST_TOKEN_FILE": "/dev/null"}, "is not a file"),
    ],
)
def test_a_token_that_cannot_be_used_is_refused_with_the_reason(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        read_token(environ)
    assert caught.value.try_
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_may_read_holds_no_token(private: Path, mode: int) -> None:
    private.chmod(mode)
    with pytest.raises(SpecError, match=f"has mode {mode:o}: others may read it") as caught:
        read_token({"QDIST_TOKEN_FILE": str(private)})
    assert caught.value.try_ == f"chmod 600 '{private}'"


def test_tokens_are_drawn() -> None:
    assert new_token() != new_token()
    assert read_token({"QDIST_TOKEN": new_token()})


def test_both_sides_prove_that_they_know_the_token() -> None:
    nonce = draw_nonce()
    answer, expected = respond(greeting(nonce), TOKEN)
    assert is_proved(verdict(answer, TOKEN, nonce), expected)
    assert verdict(answer, TOKEN + "x", nonce) == REFUSED
    assert verdict(answer, TOKEN, draw_nonce()) == REFUSED, "a proof of another connection"
    assert TOKEN.encode() not in answer + expected


def test_a_proof_cannot_be_sent_back_to_where_it_came_from() -> None:
    assert proofs(TOKEN, b"a", b"b").gate != proofs(TOKEN, b"a", b"b").door


@pytest.mark.parametrize("line", [b"", b"HTTP/1.1 400 Bad Request", b"qdist-gate xyz", b"qdist-gate " + b"a" * 33])
def test_other_lines_are_neither_greeting_nor_answer(line: bytes) -> None:
    with pytest.raises(ValueError, match="not the greeting"):
        respond(line, TOKEN)
    with pytest.raises(ValueError, match="not the answer"):
        verdict(line, TOKEN, draw_nonce())
