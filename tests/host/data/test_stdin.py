"""Standard input is read once, and is a file from then on."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qdist.core.errors import DataError, SpecError
from qdist.core.spec.sections import Data
from qdist.host.data.sources import split_sources
from qdist.host.data.stdin import kept

LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "a cache, of mine"))


def given(content: bytes, monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal))


def test_what_comes_in_is_kept_under_the_name_of_its_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    given(LINES, monkeypatch)
    first = kept(Data(path="-"))
    assert Path(first.path).read_bytes() == LINES
    given(LINES, monkeypatch)
    assert kept(Data(path="-")) == first
    assert [path.name for path in Path(first.path).parent.iterdir()] == [Path(first.path).name]


def test_it_may_be_one_of_several_sources_or_what_is_evaluated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given(LINES, monkeypatch)
    one, other = split_sources(kept(Data(path="a.jsonl:0.5,-#1:0.5")).path)
    assert (one.path, other.count, other.weight) == ("a.jsonl", 1, 0.5)
    assert Path(other.path).read_bytes() == LINES
    given(LINES, monkeypatch)
    data = kept(Data(path="a.jsonl", eval="-"))
    assert data == Data(path="a.jsonl", eval=other.path)


def test_nothing_is_read_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert kept(Data(path="a.jsonl", eval="b.jsonl")) == Data(path="a.jsonl", eval="b.jsonl")


def test_a_terminal_or_nothing_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(LINES, monkeypatch, terminal=True)
    with pytest.raises(SpecError, match="standard input is a terminal"):
        kept(Data(path="-"))
    given(b"", monkeypatch)
    with pytest.raises(DataError, match=r"standard input holds no record \(0 bytes\)"):
        kept(Data(path="-"))
    with pytest.raises(SpecError, match="can be read once, not 2 times"):
        kept(Data(path="-", eval="-"))
