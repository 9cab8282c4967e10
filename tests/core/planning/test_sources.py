"""What each source gives to a run is told in a plan and in a report."""

from qdist.core.planning.plan import DataFacts, Part, mixture_of
from qdist.core.planning.sources import epoch_in_words, sources_in_words
from tests.plans import CPU, planned

A, B = Part(name="a.jsonl", first=0, samples=6000, weight=7), Part(name="b.csv", first=6000, samples=3000, weight=3)
C = Part(name="c.jsonl", first=9000, samples=1, held_out=True)


def facts(*parts: Part, mixture: int = 0) -> DataFacts:
    return DataFacts(
        path="cache", samples=9001, train_samples=9000, held_out_samples=1, tokens=90010, longest=10, parts=parts,
        mixture=mixture,
    )  # fmt: skip


def test_shares_of_a_mixture_are_told_and_what_is_evaluated_on() -> None:
    mixed = facts(A, B, C, mixture=10_000)
    assert sources_in_words(mixed) == (
        "a.jsonl: 70 % of the samples, from 6,000",
        "b.csv: 30 % of the samples, from 3,000",
        "c.jsonl: 1 sample, evaluated on",
    )
    assert epoch_in_words(mixed) == "10,000 samples of the mixture"


def test_one_source_alone_needs_no_words() -> None:
    assert sources_in_words(facts(C)) == ()
    assert epoch_in_words(facts(C)) == "9,000 samples"


def test_an_epoch_of_a_mixture_decides_the_steps() -> None:
    assert mixture_of((A, B, C), (6000, 3000)) == 10_000
    assert mixture_of((C,), (6000,)) == 0
    plan = planned(
        "smollm2-135m", CPU, {"global_batch": 16, "epochs": 2.0, "steps": None}, data=facts(A, B, C, mixture=10_000)
    )
    assert plan.steps == 1250
