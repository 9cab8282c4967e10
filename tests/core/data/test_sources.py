"""What `--data` names, and how sources are mixed."""

from itertools import pairwise

import pytest

from qdist.core.data.sources import SourcePart, block_of, drawn, epoch_of, parse_sources, written
from qdist.core.errors import SpecError

A, B = SourcePart("a.jsonl"), SourcePart("b.parquet")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.jsonl", (A,)),
        ("", (SourcePart(""),)),
        ("a.jsonl,b.parquet", (A, B)),
        ("a.jsonl, b.parquet", (A, B)),
        ("a.jsonl:0.7,b.parquet:.3", (SourcePart("a.jsonl", 0.7), SourcePart("b.parquet", 0.3))),
        ("a.jsonl:7,b.parquet:3e0", (SourcePart("a.jsonl", 7.0), SourcePart("b.parquet", 3.0))),
        ("b.parquet#2000", (SourcePart("b.parquet", None, 2000),)),
        ("b.parquet#2_000,a.jsonl", (SourcePart("b.parquet", None, 2000), A)),
        ("a.jsonl#5:0.5,b.parquet:0.5#6", (SourcePart("a.jsonl", 0.5, 5), SourcePart("b.parquet", 0.5, 6))),
        ("owner/name:subset@train[:1%]", (SourcePart("owner/name:subset@train[:1%]"),)),
        ("owner/name:test,demo", (SourcePart("owner/name:test"), SourcePart("demo"))),
        ("owner/name:2020@train", (SourcePart("owner/name:2020@train"),)),
        ("a.jsonl:train", (SourcePart("a.jsonl:train"),)),
        ("a#b.jsonl", (SourcePart("a#b.jsonl"),)),
        ("-:0.5,a.jsonl:0.5", (SourcePart("-", 0.5), SourcePart("a.jsonl", 0.5))),
    ],
)
def test_a_text_names_sources_with_weights_and_counts(text: str, parts: tuple[SourcePart, ...]) -> None:
    assert parse_sources(text) == parts
    assert parse_sources(written(parts)) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b:1.jsonl", (SourcePart("a,b:1.jsonl"),)),
        ("x.jsonl,a,b:1.jsonl", (SourcePart("x.jsonl"), SourcePart("a,b:1.jsonl"))),
        ("a,b:1.jsonl:2,x.jsonl:1", (SourcePart("a,b:1.jsonl", 2.0), SourcePart("x.jsonl", 1.0))),
        ("run:2", (SourcePart("run:2"),)),
        ("run:2#3", (SourcePart("run:2", None, 3),)),
        ("c#7", (SourcePart("c#7"),)),
    ],
)
def test_the_name_of_a_file_that_exists_is_taken_as_it_is(text: str, parts: tuple[SourcePart, ...]) -> None:
    assert parse_sources(text, {"a,b:1.jsonl", "run:2", "c#7"}.__contains__) == parts


@pytest.mark.parametrize(
    ("text", "said", "tried"),
    [
        ("a.jsonl:0.7", "a.jsonl is the only source, so its weight 0.7 has no effect", "--data a.jsonl"),
        ("a.jsonl,b.parquet:3", "a.jsonl has no weight, and 1 of 2 sources have one", "--data a.jsonl:1,b.parquet:3"),
        ("a.jsonl:0,b.parquet:1", "a.jsonl:0 has the weight 0", "leave it out, or give it a weight such as 0.1"),
        ("a.jsonl:-1,b.parquet:1", "a.jsonl:-1 has the weight -1", "leave it out, or give it a weight such as 0.1"),
        ("a.jsonl:1e999,b:1", "has the weight 1e999", "leave it out, or give it a weight such as 0.1"),
        ("a.jsonl#0", "a.jsonl#0 takes none of its records", "at least one: a.jsonl#1"),
        ("a.jsonl,,b.parquet", "names a source without a name", "one comma between two sources"),
        ("a.jsonl,", "names a source without a name", "one comma between two sources"),
    ],
)
def test_what_cannot_be_mixed_is_refused(text: str, said: str, tried: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_sources(text)
    assert said in caught.value.message
    assert caught.value.try_ == tried


@pytest.mark.parametrize(
    ("position", "weights", "counts"),
    [
        (1000, (0.7, 0.3), (700, 300)),
        (1000, (7, 3), (700, 300)),
        (10, (0.7, 0.3), (7, 3)),
        (1000, (1, 1, 1), (334, 333, 333)),
        (3000, (1, 1, 1), (1000, 1000, 1000)),
        (1, (0.5, 0.5), (1, 0)),
        (10**12, (0.1, 0.2, 0.7), (10**11, 2 * 10**11, 7 * 10**11)),
    ],
)
def test_a_mixture_draws_exact_shares(position: int, weights: tuple[float, ...], counts: tuple[int, ...]) -> None:
    assert drawn(position, weights) == counts


@pytest.mark.parametrize("weights", [(1.0,) * 40, (1e-6, 1.0, 1e-3), (0.001, 0.0011, 0.5), (3.0, 1.0)])
def test_no_block_of_a_mixture_draws_less_than_nothing(weights: tuple[float, ...]) -> None:
    block = block_of(weights)
    totals = [drawn(number * block, weights) for number in range(200)]
    for before, after in pairwise(totals):
        assert sum(after) - sum(before) == block
        assert all(later >= earlier for earlier, later in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("sizes", "weights", "samples"),
    [((700, 300), (0.7, 0.3), 1000), ((700, 600), (0.7, 0.3), 2000), ((10, 1), (1, 1), 20), ((5, 5), (0.7, 0.3), 17)],
)
def test_an_epoch_of_a_mixture_uses_up_every_source(
    sizes: tuple[int, ...], weights: tuple[float, ...], samples: int
) -> None:
    assert epoch_of(sizes, weights) == samples
    assert all(given >= size for given, size in zip(drawn(samples, weights), sizes, strict=True))
