"""Do long lines break between words?"""

from qdist.core.text import fitted


def test_words_stay_whole_and_what_follows_has_a_margin() -> None:
    assert fitted("error: " + "word " * 12, 40, margin=7) == [
        "error: word word word word word word",
        "       word word word word word word",
    ]
    assert fitted("a" * 90, 40, margin=7) == ["a" * 90]
    assert fitted("", 40, margin=7) == [""]
    assert fitted("  indented", 40, margin=7) == ["  indented"]
