"""Messages of one and of several lines."""

import builtins

import pytest

from qdist.host.typed import Typed


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> list[str | type[BaseException]]:
    """Lines to be typed; an exception in place of one is raised; and what is asked for comes to `prompts`."""
    lines: list[str | type[BaseException]] = []

    def typed(prompt: str) -> str:
        line = lines.pop(0) if lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)
    return lines


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["one", " two "], ["one", "two", None]),
        (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four", None]),
        (['"""one', "", 'two"""', "three"], ["one\n\ntwo", "three", None]),
        (['"""one"""', '"""', "two", '"""'], ["one", "two", None]),
        (["one\\"], ["one", None]),
        (['"""one', "two"], ["one\ntwo", None]),
        (["one\\", KeyboardInterrupt, "two"], ["two", None]),
        (['"""one', "two", KeyboardInterrupt, "three"], ["three", None]),
        ([KeyboardInterrupt], [None]),
        ([""], ["", None]),
    ],
)
def test_messages_are_one_line_or_several(
    typing: list[str | type[BaseException]], lines: list[str | type[BaseException]], messages: list[str | None]
) -> None:
    typing += lines
    with Typed() as typed:
        assert [typed.message() for _ in messages] == messages
