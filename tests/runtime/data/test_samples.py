"""What a step trains on follows from the plan and the step, however it is cut."""

import msgspec
import pytest

from qdist.core.planning.plan import Plan
from qdist.runtime.data.batches import Samples, read_samples
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


@pytest.mark.parametrize("packed", [False, True])
def test_steps_do_not_depend_on_what_was_asked_before(plan: Plan, packed: bool) -> None:
    """So a resumed run goes on with the same micro-batches."""
    fresh, used = samples_with(plan, packed=packed), samples_with(plan, packed=packed)
    for step in range(9):
        used.step(step)
    assert fresh.step(5) == used.step(5)


def test_learned_tokens_leave_prompts_and_padding_out(plan: Plan) -> None:
    samples = samples_with(plan)
    batch = samples.batch([0, 13])
    assert samples.tokens([0, 13]) == LENGTHS[0] + LENGTHS[13]
    assert samples.learned([0, 13]) == int((batch["labels"][:, 1:] != -100).sum()) == LENGTHS[0] + LENGTHS[13] - 4


def test_random_samples_are_the_same_each_time_and_full_length(plan: Plan) -> None:
    first, again = read_samples(plan, pad_id=0), read_samples(plan, pad_id=0)
    assert first.tokenized.tokens.equal(again.tokenized.tokens)
    assert len(first.tokenized) == 8 * 8
    assert first.tokens([0]) == 16


@pytest.mark.parametrize("step", [0, 4])
def test_packed_and_on_any_number_of_ranks_a_step_has_the_samples_of_the_unpacked_run(plan: Plan, step: int) -> None:
    wanted = sorted(index for batch in samples_with(plan, micro_batch=2).step(step) for index in batch)
    for ranks in (1, 2, 3):
        bins = samples_with(plan, packed=True, micro_batch=2, world_size=ranks).step(step)
        assert len(bins) % ranks == 0
        assert sorted(index for own in bins for index in own) == wanted


def test_packed_held_out_samples_are_each_in_one_bin(plan: Plan) -> None:
    samples = samples_with(plan, packed=True, micro_batch=2)
    bins = samples.held_out_batches()
    assert sorted(index for own in bins for index in own) == samples.held_out
    assert len(bins) < len(samples_with(plan, micro_batch=1).held_out_batches())


def test_a_pipeline_has_a_bin_for_each_of_its_stages(plan: Plan) -> None:
    samples = samples_with(
        plan, packed=True, micro_batch=8, placement="split", schedule="1f1b", gpus_per_group=3, layer_map=(0, 1, 2)
    )
    assert [bool(own) for own in samples.step(0)] == [True] * 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_empty_bin_is_all_padding_and_learns_nothing(plan: Plan, device: str) -> None:
    samples = samples_with(plan, packed=True, micro_batch=2, device=device)
    batch = samples.batch([])
    assert (samples.learned([]), samples.tokens([]), samples.padding([])) == (0, 0, 2 * plan.seq_len)
    assert (batch["labels"] == -100).all()
    assert (batch["targets"] == -100).all()
    assert len(batch["targets"]) == (
        0 if device == "cpu" else min(samples.batch(own)["targets"].numel() for own in FEW)
    )


FEW = ([0], [1], [2])


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_that_are_captured_have_few_shapes(plan: Plan, packed: bool) -> None:
    """Others have no more padding than they need."""
    shapes: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
    for device in ("cuda", "cpu"):
        samples = samples_with(plan, packed=packed, micro_batch=2, device=device, graphs=device == "cuda", steps=6)
        batches = [batch for step in range(6) for batch in samples.step(step)]
        made = [samples.batch(own) for own in batches]
        shapes[device] = {tuple(tuple(value.shape) for value in batch.values()) for batch in made}
        for own, batch in zip(batches, made, strict=True):
            assert samples.tokens(own) + samples.padding(own) == batch["input_ids"].numel()
            assert int((batch["targets"] != -100).sum()) == samples.learned(own)
    assert len(shapes["cuda"]) <= (4 if packed else 8)
    assert len(shapes["cuda"]) < len(shapes["cpu"])
    assert len({shape[0] for shape in shapes["cuda"]}) <= (1 if packed else 4)


def test_rows_on_a_gpu_that_are_not_captured_are_as_wide_as_they_must_be(plan: Plan) -> None:
    plain, tight = (samples_with(plan, micro_batch=2, device=device) for device in ("cuda", "cpu"))
    for own in plain.step(0):
        assert plain.batch(own)["input_ids"].shape == tight.batch(own)["input_ids"].shape
        assert len(plain.batch(own)["targets"]) == plain.learned(own)


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_beside_each_other_have_one_shape_where_shapes_are_few(plan: Plan, packed: bool) -> None:
    """NCCL wants all ranks of a shard to launch, or all of them to replay."""
    samples = samples_with(plan, packed=packed, micro_batch=2, device="cuda", graphs=True, steps=6, world_size=2)
    apart = 0
    for step in range(6):
        batches = samples.step(step)
        for first in range(0, len(batches), 2):
            beside = batches[first : first + 2]
            made = [samples.batch(own, beside) for own in beside]
            shapes = {tuple(tuple(value.shape) for value in batch.values()) for batch in made}
            assert len(shapes) == 1
            apart += len({samples.batch(own)["targets"].shape for own in beside}) - 1
            for own, batch in zip(beside, made, strict=True):
                assert samples.tokens(own) + samples.padding(own, beside) == batch["input_ids"].numel()
                assert int((batch["targets"] != -100).sum()) == samples.learned(own)
    assert apart
