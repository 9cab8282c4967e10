"""Does a look at data see what training would, record by record, and what a person should know of it before?"""

import json
from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.overview import Overview, Piece
from qdist.core.data.reading import reading_of
from qdist.core.spec.run_spec import nest, resolve
from qdist.host.data.sources import read_source, sources_of
from qdist.runtime.data.tokenizing import sample_rules, tokenize_sources
from qdist.runtime.train.overview import overview
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer

A = {"input": "a", "output": "b"}
C = {"input": "c", "output": "d"}
LONG = {"input": "a", "output": "b" * 50}
TEXT = {"text": "one two three four five six seven eight nine ten eleven twelve"}
EMPTY = {"input": "a", "output": ""}
BAD = {"words": "none"}
CALL = {"function": {"name": "look", "arguments": {}}}
TOOLS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, *records: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def seen(data: str, *, template: str | None = None, bare: bool = False, **more: Any) -> Overview:
    """The overview of some data, with a tiny tokenizer unless `bare`.

    more: samples and limit of the overview, and settings, with __ for dots.
    """
    samples, limit = more.pop("samples", 0), more.pop("limit", None)
    stated = {key.replace("__", "."): value for key, value in more.items()}
    settings = {"model": "tiny", "data": data, "seq_len": 24, **stated}
    spec = resolve(nest(settings))
    tokenizer, rules = (None, None) if bare else (tiny_tokenizer(template), sample_rules(spec, rows=None))
    return overview(spec, tokenizer, rules, samples=samples, limit=limit)


def test_what_is_learned_of_a_sample_is_shown_apart() -> None:
    found = seen(written("d.jsonl", A, C), template=CHATML, samples=1)
    (shown,) = found.shown
    assert (shown.where, shown.cut) == ("d.jsonl:1", 0)
    assert [piece.learned for piece in shown.pieces] == [False, True, False]
    assert shown.pieces[0].text.endswith("<|im_start|>assistant\n")
    assert shown.pieces[1:] == (Piece("b<|im_end|>", True), Piece("\n", False))
    assert (found.samples, found.formats, found.tokenizer) == (2, (("input-output", 2),), "tiny")


def test_characters_of_several_tokens_are_shown_whole() -> None:
    (shown,) = seen(written("d.jsonl", {"input": "é🦜", "output": "🦜é"}), samples=1, train__held_out=0).shown
    assert "".join(piece.text for piece in shown.pieces).removeprefix("<s>").removesuffix("</s>") == "é🦜🦜é"


def test_lengths_and_what_is_cut_are_those_of_training() -> None:
    data = written("d.jsonl", A, LONG, TEXT, EMPTY)
    found = seen(data, samples=9, train__held_out=0)
    spec = resolve(nest({"model": "tiny", "data": data, "seq_len": 24, "train.held_out": 0}))
    sources = [read_source(own, reading_of(spec.data, spec.format), seed=0) for own in sources_of(spec.data)]
    trained = tokenize_sources(sources, tiny_tokenizer(), sample_rules(spec, rows=None))
    assert (found.samples, found.length, found.learned) == (
        len(trained),
        trained.summary.tokens,
        trained.summary.learned_tokens,
    )
    assert found.longest == max(trained.offsets.diff().tolist())
    assert sum(bar.count for bar in found.lengths) == found.samples
    assert (found.cut, found.cut_median) == (1, found.cut_most)
    assert [shown.cut for shown in found.shown if shown.where == "d.jsonl:2"] == [found.cut_most]
    assert set(trained.summary.notes) == set(found.notes)
    assert any("1 document became" in note for note in found.notes)
    assert "1 of 4 records were dropped: the answer is empty" in found.notes


def test_a_document_is_shown_piece_by_piece() -> None:
    found = seen(written("d.jsonl", TEXT), samples=9)
    assert len(found.shown) == found.samples > 1
    assert {shown.where for shown in found.shown} == {"d.jsonl:1"}
    assert {shown.cut for shown in found.shown} == {0}


@pytest.mark.parametrize("bare", [False, True])
def test_records_that_say_the_same_are_named_wherever_they_are(bare: bool) -> None:
    written("a.jsonl", A, C, A)
    written("b.jsonl", C)
    found = seen("a.jsonl,b.jsonl", bare=bare)
    assert (found.duplicates, found.first_duplicates) == (2, (("a.jsonl:3", "a.jsonl:1"), ("b.jsonl:1", "a.jsonl:2")))
    assert seen("a.jsonl,a.jsonl", bare=bare).duplicates == 4


@pytest.mark.parametrize("bare", [False, True])
def test_held_out_samples_that_are_trained_on_too_are_counted(bare: bool) -> None:
    written("a.jsonl", A, C)
    written("b.jsonl", C, LONG)
    found = seen("a.jsonl", data__eval="b.jsonl", bare=bare)
    assert (found.held_out, found.overlap) == (2, 1)
    assert [(own.name, own.records, own.held_out) for own in found.sources] == [
        ("a.jsonl", 2, False),
        ("b.jsonl", 2, True),
    ]


@pytest.mark.parametrize("bare", [False, True])
def test_bad_records_are_counted_with_their_places(bare: bool) -> None:
    data = written("d.jsonl", A, BAD, C, BAD)
    found = seen(data, bare=bare)
    assert (found.records, found.samples, found.bad, found.refused) == (4, 2, 2, True)
    assert found.first_bad[0].startswith("d.jsonl:2: keys words fit no known record format")
    assert not seen(data, bare=bare, data__skip_bad=2).refused


def test_a_limit_is_of_each_source() -> None:
    written("a.jsonl", A, C, LONG)
    written("b.jsonl", C)
    found = seen("a.jsonl,b.jsonl", limit=2)
    assert (found.whole, [own.records for own in found.sources]) == (False, [2, 1])
    assert seen("a.jsonl", limit=3).whole


def test_without_a_model_lengths_are_characters() -> None:
    found = seen(written("d.jsonl", A, EMPTY), bare=True, samples=1, train__held_out=0)
    assert (found.samples, found.length, found.learned, found.tokenizer) == (1, 2, 1, "")
    assert found.shown[0].pieces == (Piece("a", False), Piece("b", True))
    assert found.dropped == (("the answer is empty", 1),)
    assert seen("d.jsonl", bare=True, train__train_on_source=True).learned > 1


def test_tools_without_a_model_are_neither_dropped_nor_refused() -> None:
    found = seen(written("d.jsonl", TOOLS), bare=True)
    assert (found.samples, found.unread, found.dropped, found.refusal, found.refused) == (0, 1, (), "", False)


@pytest.mark.parametrize(
    ("records", "more", "why"),
    [
        ((A, C), {"train__held_out": 5}, "train.held_out=5 leaves none of 2 samples to train on"),
        ((A,), {}, "1 sample cannot be split into training and held-out data"),
        ((TEXT,), {"data__template": "chatml"}, "data.template=chatml words conversations, and these records are text"),
    ],
)
def test_what_training_would_refuse_of_good_records_is_told(
    records: tuple[dict[str, Any], ...], more: dict[str, Any], why: str
) -> None:
    found = seen(written("d.jsonl", *records), **more)
    assert found.refusal.startswith(why)
    assert found.refused
    assert found.refusal_try
