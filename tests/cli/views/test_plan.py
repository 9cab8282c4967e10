"""A plan, as lines for a person."""

from qdist.cli.views.plan import plan_lines
from qdist.core.data.conversation import Wording
from qdist.core.planning.plan import DataFacts, Part
from tests.plans import CPU, planned

PARTS = (
    Part(name="a.jsonl", first=0, samples=6000, weight=0.7),
    Part(name="b.csv", first=6000, samples=3000, weight=0.3),
    Part(name="c.jsonl", first=9000, samples=100, held_out=True),
)


def test_several_sources_are_told_with_their_shares() -> None:
    data = DataFacts(
        path="cache", samples=9100, train_samples=9000, held_out_samples=100, tokens=91000, longest=10, parts=PARTS,
        mixture=10_000, records=9100, wording=Wording(format="alpaca", style="chat"),
    )  # fmt: skip
    lines = plan_lines(planned("smollm2-135m", CPU, {"global_batch": 16, "steps": None}, data=data))
    start = lines.index("data     9100 records, alpaca, chat template")
    assert lines[start + 1 : start + 5] == [
        "         a.jsonl: 70 % of the samples, from 6,000",
        "         b.csv: 30 % of the samples, from 3,000",
        "         c.jsonl: 100 samples, evaluated on",
        "steps    625 over 10,000 samples of the mixture, 100 held out",
    ]
