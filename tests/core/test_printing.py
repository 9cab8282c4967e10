import pytest

from qdist.core.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \u00e9\u4e2d\U0001f600\n\ttabs", "plain, \u00e9\u4e2d\U0001f600\n\ttabs"),
        ("\x1b[31mred\x1b[0m \x9b1mbold", "red bold"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]0;a title\x07 \x1b]8;;http://x\x1b\\a link", " a link"),
        ("\x1bPdevice\x9c\x1b_program\x1b\\", ""),
        ("\x1b]52;c;an unended one", " ]52;c;an unended one"),
        ("100 %\r0 %", "100 % 0 %"),
        ("one\r\ntwo", "one\ntwo"),
        ("gnp.\u202eexe \u2066x\u2069", "gnp. exe  x "),
        ("a\0b\x85c\x7fd\ufeffe", "a b c d e"),
        ("half \ud83d of one", "half \ufffd of one"),
        ("\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469"),
    ],
)
def test_nothing_of_a_text_controls_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_colours_of_our_own_may_stay_and_nothing_else() -> None:
    assert printable("\x1b[1;32mok\x1b[0m\x1b[2K\x1b[?25l", colours=True) == "\x1b[1;32mok\x1b[0m"


def test_a_text_in_pieces_is_as_harmless() -> None:
    text = "\x1b[31mred\x1b]0;title\x07\x9b2J"
    for cut in range(len(text)):
        assert not {"\x1b", "\x9b", "\x07"} & set(printable(text[:cut]) + printable(text[cut:]))
