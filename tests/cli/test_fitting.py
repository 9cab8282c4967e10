"""Do long lines break between words?"""

import pytest
from click.testing import CliRunner

from qdist.cli.fitting import fitted
from qdist.cli.main import main


def test_words_stay_whole_and_what_follows_has_a_margin() -> None:
    assert fitted("error: " + "word " * 12, 40, margin=7) == [
        "error: word word word word word word",
        "       word word word word word word",
    ]
    assert fitted("a" * 90, 40, margin=7) == ["a" * 90]
    assert fitted("", 40, margin=7) == [""]
    assert fitted("  indented", 40, margin=7) == ["  indented"]


def test_an_error_fits_a_terminal_and_its_command_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    plain = CliRunner().invoke(main, ["launch", "--model", "smollm2-135m", "--data", "/no/such/folder/and/file.jsonl"])
    monkeypatch.setattr("qdist.cli.main.sys", type("Sys", (), {"stderr": Terminal()}))
    shown = CliRunner().invoke(main, ["launch", "--model", "smollm2-135m", "--data", "/no/such/folder/and/file.jsonl"])
    assert shown.exit_code == plain.exit_code != 0
    assert " ".join(shown.output.split()) == " ".join(plain.output.split())
    assert "\n       " in shown.output


class Terminal:
    """Standard error as a person sees it."""

    def isatty(self) -> bool:
        return True
