"""What a step trains on follows from the plan and the step, however it is cut."""

import msgspec
import pytest

from qdist.core.planning.plan import Plan
from qdist.runtime.data.batches import Samples, fullest, micro_batch_seed, read_samples, split
from tests.runtime.tiny import plan_of, samples_of, save_config

LENGTHS = [3 + n % 14 for n in range(50)]


def samples_with(plan: Plan, **changes: object) -> Samples:
    return Samples(msgspec.structs.replace(plan, **changes), samples_of(LENGTHS), pad_id=2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(save_config(folder / "model"), folder / "run", global_batch=8)


@pytest.mark.parametrize("step", [0, 3, 17])
def test_a_step_has_the_same_samples_in_the_same_order_for_every_micro_batch(plan: Plan, step: int) -> None:
    cut = [samples_with(plan, micro_batch=size).step(step) for size in (1, 2, 4, 8)]
    assert [[len(batch) for batch in batches] for batches in cut] == [[1] * 8, [2] * 4, [4] * 2, [8]]
    assert len({tuple(index for batch in batches for index in batch) for batches in cut}) == 1


def test_an_epoch_has_every_training_sample_once_and_no_held_out_one(plan: Plan) -> None:
    samples = samples_with(plan)
    seen = [index for step in range(6) for batch in samples.step(step) for index in batch]
    epoch = seen[:45]
    assert len(samples.held_out) == 5
    assert sorted(epoch + samples.held_out) == list(range(50))
    assert not set(seen) & set(samples.held_out)


def test_held_out_batches_hold_each_held_out_sample_once(plan: Plan) -> None:
    for size in (1, 2, 4):
        batches = samples_with(plan, micro_batch=size).held_out_batches()
        assert [index for batch in batches for index in batch] == samples_with(plan).held_out


def test_steps_do_not_depend_on_what_was_asked_before(plan: Plan) -> None:
    fresh, used = samples_with(plan), samples_with(plan)
    for step in range(9):
        used.step(step)
    assert fresh.step(5) == used.step(5)


def test_learned_tokens_leave_prompts_and_padding_out(plan: Plan) -> None:
    samples = samples_with(plan)
    batch = samples.batch([0, 13])
    assert samples.tokens([0, 13]) == LENGTHS[0] + LENGTHS[13]
    assert samples.learned([0, 13]) == int((batch["labels"][:, 1:] != -100).sum()) == LENGTHS[0] + LENGTHS[13] - 4


def test_the_fullest_micro_batch_of_each_size_is_told_before_the_run(plan: Plan) -> None:
    """By what a plan counts with, against a walk over all that the run will see."""
    tokenized = samples_of(LENGTHS)
    spec = msgspec.structs.replace(plan.spec, steps=7)
    train, _ = split(len(tokenized), held_out=spec.train.held_out, seed=spec.seed)
    found = fullest(tokenized, train, spec)
    assert [(own.samples, len(own.learned)) for own in found] == [
        (1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1),
    ]  # fmt: skip
    for own in found:
        samples, ranks = samples_with(plan, micro_batch=own.samples), len(own.learned)
        for rank in range(ranks):
            seen = [batch for step in range(7) for batch in samples.step(step)[rank::ranks]]
            assert own.learned[rank] == max(map(samples.learned, seen))
            assert own.positions[rank] == max(samples.batch(batch)["input_ids"].numel() for batch in seen)


def test_random_samples_are_the_same_each_time_and_full_length(plan: Plan) -> None:
    first, again = read_samples(plan, pad_id=0), read_samples(plan, pad_id=0)
    assert first.tokenized.tokens.equal(again.tokenized.tokens)
    assert len(first.tokenized) == 8 * 8
    assert first.tokens([0]) == 16


def test_every_micro_batch_has_a_dropout_seed_of_its_own() -> None:
    seeds = {micro_batch_seed(seed, step, index) for seed in range(4) for step in range(20) for index in range(20)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
