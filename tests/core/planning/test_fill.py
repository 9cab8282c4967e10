"""Do plans count in tokens a micro-batch, and pack samples where that is worth it?"""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from qdist.cli.views.plan import outcome_rows, plan_lines
from qdist.core.errors import PlanError, SpecError
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.fill import Batches, MicroBatch
from qdist.core.planning.plan import DataFacts, Fill, Plan
from qdist.core.planning.render import deepspeed_config
from qdist.core.spec.run_spec import resolve
from qdist.core.telemetry.report_sections import choices_of
from tests.plans import CPU, machine, planned

H200, TWO = machine(140), machine(140, 140)


def data(
    mean: int, *, longest: int = 512, fills: Sequence[Fill] = (), attended: float = 0.0, path: str = "c"
) -> DataFacts:
    return DataFacts(
        path=path, samples=100, train_samples=95, held_out_samples=5, tokens=100 * mean, longest=longest,
        fills=tuple(fills), attended=attended,
    )  # fmt: skip


def fill(samples: int, micro_batches: float, share: float, *, ranks: int = 1, packed: bool = True) -> Fill:
    return Fill(samples=samples, ranks=ranks, micro_batches=micro_batches, share=share, packed=packed)


@pytest.mark.parametrize(
    ("found", "ranks", "micro_batch", "expected"),
    [
        # Not read: samples are all of the longest sequence.
        (None, 2, MicroBatch(4), None),
        (data(150, path=""), 2, MicroBatch(4), None),
        (None, 2, MicroBatch(4, packed=True), fill(4, 2.0, 1.0, ranks=2)),
        # Read, and not counted: rows as wide as the longest; bins are not filled to the last position.
        (data(128), 2, MicroBatch(4), fill(4, 2.0, 0.25, ranks=2, packed=False)),
        (data(128), 1, MicroBatch(4, packed=True), fill(4, 2.0, 0.5)),
        (data(128), 4, MicroBatch(1, packed=True), fill(1, 2.0, 0.5, ranks=4)),
        # Counted: bins for a number of ranks, rows of one sample for any.
        (data(128, fills=[fill(4, 1.25, 0.8), fill(4, 1.0, 0.5, ranks=2)]), 1, MicroBatch(4, packed=True),
         fill(4, 1.25, 0.8)),
        (data(128, fills=[fill(4, 1.0, 0.9)]), 2, MicroBatch(4, packed=True), fill(4, 1.0, 0.5, ranks=2)),
        (data(128, fills=[fill(4, 4.0, 0.6, packed=False)]), 2, MicroBatch(4),
         fill(4, 2.0, 0.6, ranks=2, packed=False)),
    ],
)  # fmt: skip
def test_a_micro_batch_is_as_full_as_counted_or_estimated(
    found: DataFacts | None, ranks: int, micro_batch: MicroBatch, expected: Fill | None
) -> None:
    assert Batches(found, global_batch=16, ranks=ranks, longest=512).fill_of(micro_batch) == expected


PACKED: list[tuple[str, Cluster, dict[str, Any], DataFacts | None, bool]] = [
    ("llama-7b", H200, {}, data(150), True),
    ("llama-7b", TWO, {}, data(150), True),
    ("llama-7b", H200, {"pack": False}, data(150), False),
    ("llama-7b", H200, {}, data(500), False),  # nearly all as long as the longest
    ("llama-7b", H200, {}, data(150, path=""), False),  # a guess until the data are read
    ("llama-7b", H200, {}, None, False),
    ("llama-7b", H200, {"pack": True}, None, True),
    ("llama-7b", H200, {"global_batch": 1}, data(150), False),  # a row would hold one sample
    ("llama-7b", H200, {"micro_batch": 16}, data(150), False),  # a row would hold the step, and be no smaller
    ("llama-7b", H200, {"micro_batch": 2}, data(150), True),
    ("bloom-7b1", H200, {}, data(150), False),
    ("llama-7b", TWO, {"placement": "shard"}, data(150), True),
    ("llama-7b", TWO, {"split.schedule": "1f1b"}, data(150), True),
    ("llama-7b", TWO, {"split.schedule": "sequential"}, data(150), False),
    ("smollm2-135m", CPU, {}, data(150), False),
    ("smollm2-135m", CPU, {"pack": True}, data(150), True),
]


@pytest.mark.parametrize(("model", "cluster", "settings", "found", "packed"), PACKED)
def test_samples_are_packed_where_asked_for_or_where_that_is_worth_it(
    model: str, cluster: Cluster, settings: dict[str, Any], found: DataFacts | None, packed: bool
) -> None:
    assert planned(model, cluster, settings, data=found).packed == packed


@pytest.mark.parametrize(
    ("model", "cluster", "settings", "message", "attempt"),
    [
        ("bloom-7b1", H200, {}, "pack=true: bloom-7b1 writes its attention scores out", "--set pack=auto"),
        ("gpt-oss-20b", H200, {}, "pack=true: gpt-oss-20b has attention sinks", "--set pack=auto"),
        ("qwen3.5-9b", H200, {}, "pack=true: qwen3.5-9b has layers whose state", "--set pack=auto"),
        ("llama-7b", TWO, {"split.schedule": "sequential"}, "a split backbone does not pack", "--set pack=auto"),
    ],
)
def test_packing_is_refused_with_the_reason_where_samples_would_mix(
    model: str, cluster: Cluster, settings: dict[str, Any], message: str, attempt: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        planned(model, cluster, {**settings, "pack": True}, data=data(150))
    assert caught.value.try_ == attempt
    assert not planned(model, cluster, settings, data=data(150)).packed


def test_packing_is_given_up_before_layers_are_offloaded() -> None:
    """A model that fits with offloaded layers alone is split, and a split run does not pack."""
    assert planned("llama-65b", machine(24), data=data(150)).offloaded_layers
    with pytest.raises(PlanError, match="llama-65b at 4 bits needs 40") as caught:
        planned("llama-65b", machine(24), {"pack": True}, data=data(150))
    assert caught.value.try_.startswith("--set pack=auto")


def test_rows_of_packed_samples_need_not_divide_the_global_batch() -> None:
    plan = planned("llama-7b", H200, {"pack": True, "micro_batch": 5}, data=data(100))
    assert (plan.micro_batch, plan.gradient_accumulation, plan.packed) == (5, 1, True)
    with pytest.raises(SpecError, match="global_batch=16 is not a multiple of micro_batch=5"):
        resolve({"micro_batch": 5})
    # Given that the planner may pack, it may also not.
    with pytest.raises(SpecError, match="2 ranks x micro_batch=16 does not divide global_batch=16"):
        planned("llama-7b", TWO, {"micro_batch": 16}, data=data(150))


def test_rows_are_as_large_as_keeps_the_card_busy_and_them_full() -> None:
    """Sixteen samples of 150 tokens fill five rows of 512 or so: more room would be padding, less would wait."""
    plan = planned("llama-7b", H200, data=data(150))
    assert (plan.micro_batch, plan.gradient_accumulation) == (6, 1)
    many = planned("llama-7b", H200, {"global_batch": 256}, data=data(50, longest=64))
    assert many.micro_batch * many.seq_len > 4096
    assert many.useful_share > 0.8


def test_a_step_of_packed_samples_takes_as_many_micro_batches_as_were_counted() -> None:
    one = planned("llama-7b", H200, {"micro_batch": 2}, data=data(150, fills=[fill(2, 2.0, 0.9)]))
    two = planned("llama-7b", H200, {"micro_batch": 2}, data=data(150, fills=[fill(2, 2.5, 0.7)]))
    assert (one.gradient_accumulation, two.gradient_accumulation) == (2, 3)  # the mean, rounded up
    assert one.tokens_per_second == pytest.approx(two.tokens_per_second * 2.5 / 2, rel=0.05)
    assert (one.fill, two.useful_share) == (fill(2, 2.0, 0.9), 0.7)


def test_every_stage_of_a_pipeline_has_a_row_in_flight() -> None:
    """2,400 tokens have room in one row, and four stages need four."""
    settings = {"split.schedule": "1f1b", "pack": True}
    counted = [fill(8, 1.0, 0.59)]
    plan = planned(
        "llama-7b", machine(140, 140, 140, 140), {**settings, "micro_batch": 8}, data=data(150, fills=counted)
    )
    assert (plan.gradient_accumulation, plan.useful_share) == (4, 2400 / (4 * 8 * 512))
    free = planned("llama-7b", machine(140, 140, 140, 140), settings, data=data(150))
    assert free.gradient_accumulation >= 4
    assert free.useful_share > plan.useful_share
    assert "batch    16 = 4 packed rows of 4,096 positions, samples of up to 512 tokens" in lines_of(plan)


def test_a_row_of_packed_samples_is_full_in_memory() -> None:
    packed = planned("llama-7b", H200, {"micro_batch": 4, "pack": True}, data=data(100))
    padded = planned("llama-7b", H200, {"micro_batch": 4, "pack": False}, data=data(100))
    own, other = packed.ranks[0].expected[0], padded.ranks[0].expected[0]
    assert (own.activations, own.weights) == (other.activations, other.weights)


def test_attention_of_packed_samples_ends_with_them() -> None:
    short, long = (
        planned("llama3-8b", H200, {"micro_batch": 2, "pack": True, "seq_len": 4096},
                data=data(1000, longest=4096, attended=attended))
        for attended in (1000.0, 4000.0)
    )  # fmt: skip
    assert short.tokens_per_second > long.tokens_per_second


@pytest.mark.parametrize(("found", "useful"), [(data(256), 0.5), (None, 1.0), (data(256, path=""), 1.0)])
def test_predicted_tokens_are_those_without_padding(found: DataFacts | None, useful: float) -> None:
    plan = planned("llama-7b", H200, {"pack": False}, data=found)
    assert plan.useful_share == useful
    assert plan.positions_per_second * useful == pytest.approx(plan.tokens_per_second)
    assert plan.step_tokens == 16 * 512 * useful


def test_narrower_rows_are_faster() -> None:
    wide, narrow = (
        planned("llama-7b", H200, {"pack": False, "micro_batch": 16}, data=data(256, fills=fills))
        for fills in ((), [fill(16, 1.0, 0.8, packed=False)])
    )
    assert narrow.tokens_per_second > 1.4 * wide.tokens_per_second
    assert narrow.positions_per_second == pytest.approx(wide.positions_per_second, rel=0.1)


def test_a_resumed_run_goes_on_as_it_was() -> None:
    settings = {"global_batch": 16}
    packed, plain = MicroBatch(3, packed=True), MicroBatch(4)
    for usual in (packed, plain):
        plan = planned("llama-7b", H200, settings, data=data(150), usual=usual)
        assert MicroBatch(plan.micro_batch, plan.packed) == usual
    asked = planned("llama-7b", H200, {**settings, "pack": False}, data=data(150), usual=packed)
    assert not asked.packed


def test_a_packed_run_that_is_resumed_on_more_ranks_has_rows_of_no_more_than_a_ranks_samples() -> None:
    plan = planned("llama-7b", TWO, {"global_batch": 2}, data=data(150), usual=MicroBatch(2, packed=True))
    assert (plan.data_parallel, plan.micro_batch, plan.packed) == (2, 1, True)


def test_a_batch_of_deepspeed_is_a_product_whatever_the_rows_hold() -> None:
    plan = planned("llama-7b", TWO, {"zero.stage": 2, "pack": True, "micro_batch": 3}, data=data(150))
    config = deepspeed_config(plan, {})
    parts = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], plan.data_parallel
    assert config["train_batch_size"] == parts[0] * parts[1] * parts[2]


def lines_of(plan: Plan) -> str:
    return "\n".join(plan_lines(plan))


def test_a_plan_says_how_samples_are_packed_and_what_is_useful() -> None:
    counted = [fill(4, 1.0, 0.585, ranks=2)]
    packed = planned("llama-7b", TWO, {"micro_batch": 4}, data=data(150, fills=counted))
    assert "batch    16 = 2 ranks x 1 packed row of 2,048 positions, samples of up to 512 tokens" in lines_of(packed)
    assert "samples of 150 tokens on average are packed, several in a row: 58 % of the positions" in lines_of(packed)
    assert "useful tokens/s (" in lines_of(packed)
    assert "with padding) predicted" in lines_of(packed)
    assert choices_of(packed)["packed, as planned"] == "True"
    barred = lines_of(planned("bloom-7b1", H200, data=data(150)))
    assert "note     short samples are not packed: bloom-7b1 writes its attention scores out" in barred
    full = lines_of(planned("llama-7b", H200))
    assert "tokens/s predicted" in full
    assert "useful" not in full


def test_an_outcome_tells_useful_tokens_from_all_tokens_where_there_was_padding() -> None:
    plan = planned("llama-7b", H200, {"pack": False}, data=data(256))
    plan = msgspec.structs.replace(plan, tokens_per_second=5000.0)
    peaks = [[{"allocated": 1, "context": 1, "load": 0}] for _ in plan.ranks]
    result = {"peaks": peaks, "tokens_per_s": {"measured": 5000.0}, "positions_per_s": {"measured": 8000.0}}
    assert outcome_rows(plan, result)[1:] == [
        ("useful tokens/s", "5,000", "5,000", "+0.0 %"),
        ("tokens/s with padding", "10,000", "8,000", "+25.0 %"),
    ]
    assert [row[0] for row in outcome_rows(plan, {**result, "positions_per_s": {"measured": 5000.0}})][1:] == [
        "tokens/s"
    ]
