"""Does a person see what is learned, how long samples are, and what is wrong with the data?"""

import pytest

from qdist.cli.views.overview import overview_text
from qdist.core.data.overview import Bar, Overview, Piece, Shown, SourceSeen

FOUND = Overview(
    source="d.jsonl", records=5, samples=4, formats=(("alpaca", 3), ("text", 1)), wording="alpaca, chat template",
    tokenizer="tiny", seq_len=8, median=5, longest=11, length=24, learned=6, cut=1, cut_median=3, cut_most=3,
    shown=(
        Shown(where="d.jsonl:1", tokens=11, learned=2, cut=3, pieces=(Piece("ask\x1b[2J", False), Piece("so", True))),
    ),
    lengths=(Bar(4, 8, 3), Bar(8, 12, 1)), dropped=(("the answer is empty", 1),), duplicates=1,
    first_duplicates=(("d.jsonl:3", "d.jsonl:1"),), held_out=1, overlap=1, bad=1, first_bad=("d.jsonl:5: no text",),
    notes=("not used: id",),
)  # fmt: skip


def test_an_overview_names_everything_that_was_found() -> None:
    assert overview_text(FOUND, marks=True).plain.split("\n") == [
        "data     d.jsonl: 5 records, alpaca (3), text (1)",
        "worded   alpaca, chat template",
        "tokens   of tiny, up to seq_len=8 a sample",
        "",
        "d.jsonl:1   11 tokens, 2 learned, 3 cut",
        "ask⟦so⟧",
        "",
        "lengths   tokens of 4 samples: 5 in the median, 11 at most",
        " 4 to  7  ████████████████████████████████████████ 3",
        " 8 to 11  ██████████████                           1",
        "learned  6 of 24 tokens (25 %)",
        "cut      1 record: 3 tokens lost in the median, 3 at most",
        "",
        "dropped  1 of 5: the answer is empty",
        "twice    1 record with the words of an earlier one: d.jsonl:3 = d.jsonl:1",
        "held out 1 sample; 1 with the words of a training sample",
        "note     not used: id",
        "bad      1 record cannot be used:",
        "         d.jsonl:5: no text",
    ]


def test_several_sources_have_a_line_each() -> None:
    sources = (
        SourceSeen(name="a.jsonl:0.7", records=3, formats=(("alpaca", 2), ("text", 1))),
        SourceSeen(name="b.jsonl", records=1, formats=(("text", 1),), held_out=True),
    )
    found = Overview(source="a.jsonl:0.7,c.jsonl:0.3", records=4, formats=(("alpaca", 4),), sources=sources)
    assert overview_text(found, marks=True).plain.split("\n")[:3] == [
        "data     4 records of 2 sources",
        "         a.jsonl:0.7: 3 records, alpaca (2), text (1)",
        "         b.jsonl: 1 record, text, evaluated on",
    ]


def test_what_only_a_model_shows_and_why_training_would_refuse_it_is_told() -> None:
    found = Overview(source="d", records=4, unread=2, refusal="1 sample cannot be split")
    lines = overview_text(found, marks=True).plain.split("\n")
    assert "tools    2 records of 4 with tools, which only a chat template writes: --model M" in lines
    assert "refused  1 sample cannot be split" in lines


@pytest.mark.parametrize(("given", "end"), [(3997, "a⟦yes⟧"), (3998, "a⟦ye⟧..."), (4000, "aa..."), (9000, "aa...")])
def test_a_long_sample_is_shown_up_to_some_characters(given: int, end: str) -> None:
    shown = Shown(where="d:1", tokens=9, learned=1, pieces=(Piece("a" * given, False), Piece("yes", True)))
    lines = overview_text(Overview(source="d", records=1, shown=(shown,)), marks=True).plain.split("\n")
    assert lines[4].endswith(end)
    assert "⟦⟧" not in lines[4]


def test_no_length_is_told_that_no_sample_can_have() -> None:
    found = Overview(
        source="d", records=9, samples=9, tokenizer="tiny", seq_len=512, longest=512,
        lengths=(Bar(448, 512, 6), Bar(512, 576, 3)),
    )  # fmt: skip
    rows = [line.partition("█")[0] for line in overview_text(found, marks=False).plain.split("\n") if "█" in line]
    assert rows == ["448 to 511  ", "       512  "]


def test_repeated_records_are_told_without_the_path_that_is_told_above() -> None:
    pair = ("/a/long/path.json, record 7", "/a/long/path.json, record 2")
    found = Overview(source="/a/long/path.json", records=9, duplicates=1, first_duplicates=(pair,))
    assert "with the words of an earlier one: record 7 = record 2" in overview_text(found, marks=False).plain


def test_what_is_learned_is_coloured_where_colours_are_shown() -> None:
    text = overview_text(FOUND, marks=False)
    assert "⟦" not in text.plain
    assert [str(span.style) for span in text.spans if text.plain[span.start : span.end] == "so"] == ["green"]
