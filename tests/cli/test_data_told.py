"""What `qdist data` says for people beside the overview."""

from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdist.cli import data
from qdist.core.data.overview import Overview
from qdist.core.errors import JobError


def invoked(monkeypatch: pytest.MonkeyPatch, found: Overview, *words: str) -> Result:
    monkeypatch.setattr(data, "ask", lambda request: SimpleNamespace(overview=found))
    monkeypatch.setattr(data, "check_data", lambda given: None)
    return CliRunner().invoke(data.data, list(words))


@pytest.mark.parametrize(
    ("more", "tried"),
    [
        ({"samples": 0, "bad": 9}, "  try: name the columns\n"),
        ({"samples": 8, "bad": 1}, "  try: name the columns; or leave them out: --set data.skip_bad=1\n"),
        ({"samples": 8, "bad": 1, "allowed_bad": 1}, ""),
        ({"samples": 9}, ""),
    ],
)
def test_show_says_what_to_do_about_bad_records(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], tried: str
) -> None:
    found = Overview(source="d.jsonl", records=9, bad_try="name the columns", **more)
    result = invoked(monkeypatch, found, "show", "d.jsonl")
    assert (result.exit_code, result.stderr) == (0, tried)


def test_check_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    good = invoked(monkeypatch, Overview(source="d.jsonl", records=9, samples=9), "check", "d.jsonl")
    assert (good.exit_code, good.stderr) == (0, "training would take d.jsonl\n")
    bad = invoked(monkeypatch, Overview(source="d.jsonl", records=9), "check", "d.jsonl")
    assert isinstance(bad.exception, JobError)
