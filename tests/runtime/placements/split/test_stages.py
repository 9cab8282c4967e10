"""Pipelines on CPU ranks: a rank a stage trains the adapter of one process, in any grid and with any layer map."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from qdist.core.planning.plan import Plan
from qdist.core.planning.render import (
    ACCELERATE_FILE,
    DEEPSPEED_FILE,
    accelerate_config,
    deepspeed_config,
    deepspeed_policy,
)
from qdist.core.telemetry.events import Event, losses
from qdist.host import templates
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import PLAN, RunDir
from qdist.runtime.train.checkpoint import load, load_tensors
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.tiny import dummy_job, real_job, save_config, save_data, save_model

pytestmark = pytest.mark.slow
TrainRun = Callable[[prepare.Launch], RunDir]

SHAPE: dict[str, Any] = {
    "seq_len": 16, "global_batch": 8, "micro_batch": 1, "steps": 6, "lora__r": 4, "optim__lr": 3e-3,
    "train__held_out": 0.1, "train__save_steps": 4, "train__eval_steps": 4, "train__keep": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_config(folder / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path, folder: Path) -> RunDir:
    """One process."""
    return train(dummy_job(model, folder / "alone", gpus=1, **SHAPE))


def split(job: prepare.Launch, layer_map: tuple[int, ...], *, groups: int = 1, zero: int = 0) -> prepare.Launch:
    """A planned job, its backbone in stages."""
    plan = job.plan
    stages = max(layer_map) + 1
    rank = plan.ranks[0]
    new = msgspec.structs.replace(
        plan,
        placement="split",
        schedule="1f1b",
        groups=groups,
        gpus_per_group=stages,
        world_size=groups * stages,
        threads_per_rank=1,
        layer_map=layer_map,
        gradient_accumulation=plan.spec.batch // (plan.micro_batch * groups),
        engine="deepspeed" if groups > 1 else "torch",
        zero_stage=zero,
        ranks=tuple(
            msgspec.structs.replace(rank, rank=n, group=n // stages, position=n % stages)
            for n in range(groups * stages)
        ),
    )
    return job._replace(plan=new, files=files_of(new, job))


def files_of(plan: Plan, job: prepare.Launch) -> dict[str, str]:
    files = {**job.files, PLAN: msgspec.json.encode(plan).decode()}
    files[ACCELERATE_FILE] = json.dumps(accelerate_config(plan))
    if plan.engine == "deepspeed":
        files[DEEPSPEED_FILE] = json.dumps(deepspeed_config(plan, templates.policy(deepspeed_policy(plan))))
    return files


def events(run: RunDir, rank: int = 0) -> list[Event]:
    return [event for event in Follower(run.path).new_events() if event.rank == rank]


def agree(run: RunDir, other: RunDir, *, steps: int = 6) -> None:
    """Losses, held-out losses, gradient norms and adapters are the same."""
    one, two = events(run), events(other)
    assert len(losses(one)) == steps
    assert list(losses(one).values()) == pytest.approx(list(losses(two).values()), rel=1e-4)
    for field in ("held_out_loss", "gradient_norm"):
        found = {e.step: getattr(e, field) for e in one if getattr(e, field) is not None}
        wanted = {e.step: getattr(e, field) for e in two if getattr(e, field) is not None}
        assert found == pytest.approx(wanted, rel=1e-3)
        assert found
    counted, wanted_counts = run.result(), other.result()
    assert counted is not None
    assert wanted_counts is not None
    assert counted["inventory"] == wanted_counts["inventory"]
    assert counted["gradients"] == wanted_counts["gradients"] != ""
    first, second = (load_tensors(each.adapter / "adapter_model.safetensors") for each in (run, other))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    (_, state), (_, wanted_state) = load(run.checkpoint(steps)), load(other.checkpoint(steps))
    assert state.optimizer_steps == wanted_state.optimizer_steps == steps
    for moment, named in wanted_state.moments.items():
        assert named.keys() == state.moments[moment].keys()
        assert all(torch.allclose(state.moments[moment][name], value, atol=1e-4) for name, value in named.items())


@pytest.mark.parametrize("layer_map", [(0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 2, 2)], ids=str)
def test_stages_train_the_adapter_of_one_process(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, layer_map: tuple[int, ...]
) -> None:
    name = "stages-" + "".join(map(str, layer_map))
    agree(train(split(dummy_job(model, folder / name, gpus=1, **SHAPE), layer_map)), alone)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_groups_of_stages_train_the_adapter_of_one_process(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, zero: int
) -> None:
    job = dummy_job(model, folder / f"groups-{zero}", gpus=2, **SHAPE)
    run = train(split(job, (0, 0, 1, 1), groups=2, zero=zero))
    agree(run, alone)


def test_groups_of_stages_keep_their_optimizer_in_host_memory(
    train: TrainRun, model: Path, folder: Path, alone: RunDir
) -> None:
    job = dummy_job(model, folder / "offload", gpus=2, **SHAPE, zero__offload="cpu")
    agree(train(split(job, (0, 0, 1, 1), groups=2, zero=2)), alone)


def stopped(run: RunDir, path: Path, *, step: int) -> RunDir:
    """What a run that was killed behind a checkpoint leaves."""
    shutil.copytree(run.path, path)
    (path / "result.json").unlink()
    shutil.rmtree(path / "adapter")
    copy = RunDir(path)
    for later in [found for found in copy.checkpoint_steps() if found > step]:
        shutil.rmtree(copy.checkpoint(later))
    return copy


def test_stages_in_half_precision_skip_the_same_steps(train: TrainRun, model: Path, folder: Path) -> None:
    """A loss scale that is too large overflows, and no stage may step until it has come down."""
    shape = {**SHAPE, "dtype": "float16", "optim__lr": 1e-3}
    begun = train(dummy_job(model, folder / "half", gpus=1, **shape))
    one, two = (stopped(begun, folder / name, step=4) for name in ("half-alone", "half-stages"))
    for run in (one, two):
        state = run.checkpoint(4) / "state.json"
        state.write_text(state.read_text().replace("65536.0", str(2.0**24)))
        (state.parent / "DONE").write_bytes(b"")  # as of a qdist that kept no sums
    train(prepare.prepare_resume(one, {"gpus": 1}))
    train(split(prepare.prepare_resume(two, {"gpus": 2}), (0, 1, 1, 1), groups=2, zero=2))
    skipped = [sum(event.skipped for event in events(run)) for run in (one, two)]
    assert skipped[0] == skipped[1] > 0
    assert load(two.checkpoint(6))[0].optimizer_steps == 6 - skipped[1]
    assert list(losses(events(two)).values()) == pytest.approx(list(losses(events(one)).values()), rel=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_moves_into_stages_and_out_of_them(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, groups: int
) -> None:
    into = stopped(alone, folder / f"into-{groups}", step=4)
    job = prepare.prepare_resume(into, {"gpus": groups})
    agree(train(split(job, (0, 0, 0, 1), groups=groups, zero=2 if groups > 1 else 0)), alone)
    out = stopped(into, folder / f"out-{groups}", step=4)
    agree(train(prepare.prepare_resume(out, {"gpus": 1})), alone)


def test_samples_of_different_lengths_pass_through_stages(train: TrainRun, folder: Path) -> None:
    data = save_data(folder / "data.jsonl", 60)
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = "<|im_end|>"
    real = save_model(folder / "real", tokenizer=tokenizer, num_hidden_layers=4, max_position_embeddings=256)
    shape = {**SHAPE, "seq_len": 192, "global_batch": 4, "train__answers": 0}
    one = train(real_job(real, data, folder / "real-alone", gpus=1, **shape))
    agree(train(split(real_job(real, data, folder / "real-stages", gpus=1, **shape), (0, 1, 1, 1))), one)


def test_dropout_and_checkpointing_go_on_after_a_resume(train: TrainRun, model: Path, folder: Path) -> None:
    shape = {**SHAPE, "lora__dropout": 0.1, "train__checkpointing": True}
    whole = train(split(dummy_job(model, folder / "dropout", gpus=1, **shape), (0, 0, 1, 1)))
    resumed = stopped(whole, folder / "dropout-resumed", step=4)
    train(split(prepare.prepare_resume(resumed, {}), (0, 0, 1, 1)))
    assert losses(events(resumed)) == losses(events(whole))
