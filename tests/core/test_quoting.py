"""Does a printed command mean, once pasted, what it was printed for?"""

import shlex
from pathlib import Path

import pytest

from qdist.core.text import command, quoted, resuming


@pytest.mark.parametrize("path", ["runs/plain-1.5_b", "/tmp/mein ordner/lauf ä", "it's", "a;b", "$HOME", "-x", "*", ""])
def test_a_shell_takes_a_printed_command_apart_into_its_words(path: str) -> None:
    assert shlex.split(command("merge", Path(path), "--out", path)) == [
        "qdist",
        "merge",
        "./-x" if path == "-x" else str(Path(path)),
        "--out",
        path,
    ]
    assert shlex.split(resuming(path, "--set", "steps=5")) == [
        "qdist", "launch", "--resume", "--run", "./-x" if path == "-x" else path, "--set", "steps=5"
    ]  # fmt: skip


def test_a_plain_word_stays_as_it_is() -> None:
    assert resuming("runs/one") == "qdist launch --resume --run runs/one"
    assert quoted("--model", "owner/model-7b") == "--model owner/model-7b"
