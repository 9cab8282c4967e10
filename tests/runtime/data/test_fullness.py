"""What a plan is told of micro-batches is what a walk over the whole run finds."""

import msgspec
import pytest

from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec
from qdist.runtime.data.fullness import fills, fullest, row_fills
from qdist.runtime.data.stream import SampleStream, split, stream_of
from qdist.runtime.data.tokenized import TokenizedSet
from tests.runtime.data.test_samples import LENGTHS, samples_with
from tests.runtime.tiny import plan_of, samples_of, save_config


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(save_config(folder / "model"), folder / "run", global_batch=8)


def stream_over(tokenized: TokenizedSet, spec: RunSpec) -> SampleStream:
    train, _ = split(len(tokenized), held_out=spec.train.held_out, seed=spec.seed)
    return stream_of(train, (), seed=spec.seed)


def test_the_fullest_micro_batch_of_each_size_is_told_before_the_run(plan: Plan) -> None:
    """By what a plan counts with, against a walk over all that the run will see."""
    tokenized = samples_of(LENGTHS)
    spec = msgspec.structs.replace(plan.spec, steps=7)
    stream = stream_over(tokenized, spec)
    found = fullest(tokenized, stream, spec)
    assert [(own.samples, len(own.learned)) for own in found] == [
        (1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1),
    ]  # fmt: skip
    for own in found:
        samples, ranks = samples_with(plan, micro_batch=own.samples), len(own.learned)
        for rank in range(ranks):
            seen = [batch for step in range(7) for batch in samples.step(step)[rank::ranks]]
            assert own.learned[rank] == max(map(samples.learned, seen))
            assert own.positions[rank] == max(samples.batch(batch)["input_ids"].numel() for batch in seen)


def test_how_full_bins_will_be_is_told_before_the_run(plan: Plan) -> None:
    tokenized = samples_of(LENGTHS)
    spec = msgspec.structs.replace(plan.spec, steps=7)
    stream = stream_over(tokenized, spec)
    found = fills(tokenized, stream, spec)
    assert {own.ranks for own in found} == set(range(1, 9))
    assert [own.samples for own in found if own.ranks == 1] == list(range(1, max(own.samples for own in found) + 1))
    assert found[-1].micro_batches == 1.0  # a larger bin would be no fuller
    for own in found:
        samples = samples_with(plan, packed=True, micro_batch=own.samples, world_size=own.ranks)
        steps = [samples.step(step) for step in range(7)]
        assert own.micro_batches == pytest.approx(sum(map(len, steps)) / own.ranks / 7)
        positions = sum(map(len, steps)) * own.samples * plan.seq_len
        assert own.share == pytest.approx(sum(samples.tokens(each) for bins in steps for each in bins) / positions)


def test_how_full_rows_of_one_sample_will_be_is_told_before_the_run(plan: Plan) -> None:
    tokenized = samples_of(LENGTHS)
    spec = msgspec.structs.replace(plan.spec, steps=7)
    stream = stream_over(tokenized, spec)
    found = row_fills(tokenized, stream, spec)
    assert [(own.samples, own.ranks, own.micro_batches, own.packed) for own in found] == [
        (1, 1, 8.0, False), (2, 1, 4.0, False), (4, 1, 2.0, False), (8, 1, 1.0, False),
    ]  # fmt: skip
    for own in found:
        samples = samples_with(plan, micro_batch=own.samples)
        seen = [batch for step in range(7) for batch in samples.step(step)]
        tokens, padding = (sum(map(count, seen)) for count in (samples.tokens, samples.padding))
        assert own.share == tokens / (tokens + padding)
