"""Whole runs on CPU ranks: any number of them, killed anywhere, end with the same adapter and the same losses."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.telemetry.events import Event, losses
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import state_of
from qdist.runtime.train.checkpoint import load, load_tensors
from tests.runtime.tiny import dummy_job, save_config, save_data, save_model
from tests.signals import hears_signals

pytestmark = pytest.mark.slow
TrainRun = Callable[[prepare.Launch], RunDir]

SHAPE = {
    "seq_len": 16, "global_batch": 8, "steps": 6, "lora.r": 4, "lora.dropout": 0.1, "optim.lr": 3e-3,
    "train.held_out": 0.1, "train.save_steps": 2, "train.keep": 9,
}  # fmt: skip
DOTTED = {key.replace(".", "__"): value for key, value in SHAPE.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path, folder: Path) -> RunDir:
    """One rank, plain torch."""
    run = train(dummy_job(model, folder / "alone", gpus=1, **DOTTED, micro_batch=2))
    assert run.plan().engine == "torch"
    return run


@pytest.fixture(scope="module")
def two(train: TrainRun, model: Path, folder: Path) -> RunDir:
    """Two ranks, never killed."""
    return train(dummy_job(model, folder / "two", gpus=2, **DOTTED))


def adapter(run: RunDir) -> dict[str, torch.Tensor]:
    return load_tensors(run.adapter / "adapter_model.safetensors")


def furthest(one: RunDir, other: RunDir) -> float:
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def events(run: RunDir, rank: int = 0) -> list[Event]:
    return [event for event in Follower(run.path).new_events() if event.rank == rank]


def losses_of(run: RunDir) -> dict[int, float]:
    return losses(events(run))


# --- any number of ranks, any stage -------------------------------------------------------------------------------


def test_training_moves_the_adapter_and_lowers_the_loss(never_killed: RunDir) -> None:
    found = list(losses_of(never_killed).values())
    assert len(found) == STEPS
    assert sum(found[-8:]) < sum(found[:8])  # eight different steps make an epoch
    assert max(float(tensor.abs().max()) for name, tensor in adapter(never_killed).items() if "lora_B" in name) > 1e-2


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_trains_the_same_adapter(
    train: TrainRun, model: Path, folder: Path, alone: RunDir, ranks: int
) -> None:
    """Micro-batches of the same size, so that dropout draws the same numbers."""
    several = train(dummy_job(model, folder / f"several-{ranks}", gpus=ranks, **DOTTED, micro_batch=2))
    assert furthest(alone, several) < 1e-4
    assert list(losses_of(several).values()) == pytest.approx(list(losses_of(alone).values()), rel=1e-5)
    assert several.plan().world_size == ranks


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (3, "none"), (2, "cpu")])
def test_every_zero_stage_trains_the_same_adapter(
    train: TrainRun, model: Path, folder: Path, two: RunDir, stage: int, offload: str
) -> None:
    settings = {**DOTTED, "zero__stage": stage, "zero__offload": offload}
    run = train(dummy_job(model, folder / f"zero{stage}-{offload}", gpus=2, **settings))
    assert two.plan().zero_stage == 2
    assert furthest(run, two) < 1e-4
    assert (run.result() or {})["gradients"] == "finite and not zero in all 28 trained tensors"
    _, state = load(run.checkpoint(6))
    _, wanted = load(two.checkpoint(6))
    assert state.optimizer_steps == wanted.optimizer_steps == 6
    for moment, named in wanted.moments.items():
        for name, value in named.items():
            assert torch.allclose(state.moments[moment][name], value, atol=1e-4), (moment, name)


@pytest.mark.parametrize(("stage", "gradients", "optimizer"), [(0, 4, 8), (1, 2, 6), (2, 2, 6), (3, 2, 6)])
def test_zero_divides_gradients_and_optimizer_state_between_ranks(
    train: TrainRun, model: Path, folder: Path, two: RunDir, stage: int, gradients: int, optimizer: int
) -> None:
    """Bytes a trained parameter: 4 of a gradient, 8 of its moments and 4 of ZeRO's copy; halved by two ranks."""
    path = folder / f"zero{stage}-none"
    if not path.exists() and stage != 2:
        train(dummy_job(model, path, gpus=2, **DOTTED, zero__stage=stage))
    result = (two if stage == 2 else RunDir(path)).result()
    assert result is not None
    trained = result["adapter_parameters"]
    for own in result["held"]:
        assert own["adapter"] == 4 * trained
        assert own["weights"] > trained
        assert own["gradients"] == pytest.approx(gradients * trained, rel=0.02)
        assert own["optimizer"] == pytest.approx(optimizer * trained, rel=0.02)


def test_ranks_in_half_precision_train_finitely(train: TrainRun, model: Path, folder: Path) -> None:
    run = train(dummy_job(model, folder / "half", gpus=2, **DOTTED, dtype="float16"))
    found = losses_of(run)
    skipped = [event.step for event in events(run) if event.skipped]
    assert all(loss < 100 for loss in found.values())
    assert len(skipped) < 4
    assert load(run.checkpoint(6))[0].optimizer_steps == 6 - len(skipped)


@pytest.fixture(scope="module")
def plus(train: TrainRun, model: Path, folder: Path) -> RunDir:
    """One rank with LoRA+, plain torch."""
    return train(dummy_job(model, folder / "plus", gpus=1, **DOTTED, micro_batch=4, optim__lr_ratio_b=8.0))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_b_has_its_own_rate_under_zero_stages_and_when_resumed(
    train: TrainRun, model: Path, folder: Path, two: RunDir, plus: RunDir, stage: int
) -> None:
    whole = dummy_job(
        model, folder / f"plus-{stage}", gpus=2, **DOTTED, micro_batch=4, optim__lr_ratio_b=8.0, zero__stage=stage
    )
    run = train(whole)
    assert furthest(run, plus) < 1e-4
    assert furthest(run, two) > 1e-2
    resumed = copied(run, folder / f"plus-{stage}-resumed", up_to=2)
    train(prepare.prepare_resume(resumed, {"gpus": 2}))
    assert losses_of(resumed) == losses_of(run)
    assert furthest(resumed, run) == 0.0


@pytest.mark.parametrize(
    ("placement", "ranks", "engine"),
    [("replicate", 2, "torch"), ("shard", 2, "torch"), ("split", 2, "torch"), ("split", 4, "deepspeed")],
)
def test_moments_in_8_bits_go_on_with_the_same_losses(
    train: TrainRun, model: Path, folder: Path, placement: str, ranks: int, engine: str
) -> None:
    """Four ranks are two groups of two stages, whose gradients DeepSpeed adds up without ZeRO."""
    settings = {
        **DOTTED, "lora__r": 64, "lora__dropout": 0.0, "micro_batch": 2, "optim__name": "adamw-8bit",
        "placement": placement, "gpus": ranks, "gpus_per_group": 2 if placement == "split" else None,
    }  # fmt: skip
    name = f"8bit-{placement}-{ranks}"
    run = train(dummy_job(model, folder / name, **settings))
    assert (run.plan().optimizer, run.plan().engine) == ("adamw-8bit", engine)
    _, state = load(run.checkpoint(6))
    assert {value.dtype for value in state.moments["exp_avg"].values()} == {torch.uint8, torch.float32}
    assert set(state.moments["exp_avg"]) == set(state.parameters)
    resumed = copied(run, folder / f"{name}-resumed", up_to=2)
    train(prepare.prepare_resume(resumed, {}))
    assert losses_of(resumed) == losses_of(run)
    assert furthest(resumed, run) == 0.0
    alone = copied(run, folder / f"{name}-alone", up_to=2)
    train(prepare.prepare_resume(alone, {"gpus": 1, "placement": None, "gpus_per_group": None}))
    assert furthest(alone, run) < 1e-3


# --- resuming -----------------------------------------------------------------------------------------------------


def copied(run: RunDir, path: Path, *, up_to: int) -> RunDir:
    """What a run that was killed behind a checkpoint leaves."""
    import shutil

    shutil.copytree(run.path, path)
    (path / "result.json").unlink()
    shutil.rmtree(path / "adapter")
    copy = RunDir(path)
    for step in copy.checkpoint_steps():
        if step > up_to:
            shutil.rmtree(copy.checkpoint(step))
    return copy


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [(2, {}), (2, {"stage": 0}), (2, {"stage": 1}), (2, {"stage": 3}), (1, {}), (4, {})],
    ids=["as it was", "ZeRO-0", "ZeRO-1", "ZeRO-3", "1 rank", "4 ranks"],
)
def test_a_run_goes_on_with_any_ranks_and_stage(
    train: TrainRun, folder: Path, two: RunDir, ranks: int, zero: dict[str, int]
) -> None:
    run = copied(two, folder / f"resumed-{ranks}-{zero.get('stage')}", up_to=2)
    changes = {"gpus": ranks, "zero": zero, "micro_batch": 2 if ranks == 4 else 4}
    train(prepare.prepare_resume(run, changes))
    assert losses_of(run).keys() == losses_of(two).keys()
    if changes == {"gpus": 2, "zero": {}, "micro_batch": 4}:
        assert losses_of(run) == losses_of(two)
        assert furthest(run, two) == 0.0
    elif ranks != 4:  # dropout draws by micro-batch; four ranks have smaller ones
        assert furthest(run, two) < 1e-5


def test_a_finished_run_goes_on_as_if_it_had_never_ended(
    train: TrainRun, model: Path, folder: Path, alone: RunDir
) -> None:
    run = train(dummy_job(model, folder / "short", gpus=1, **{**DOTTED, "steps": 3}, micro_batch=2))
    first = adapter(run)
    job = prepare.prepare_resume(run, {"steps": 6})
    assert run.result() is not None
    train(job)
    assert losses_of(run) == losses_of(alone)
    assert furthest(run, alone) == 0.0
    result, whole = run.result(), alone.result()
    assert result is not None
    assert whole is not None
    assert (result["steps"], result["held_out"][0], result["held_out"][-1]) == (6, *whole["held_out"])
    assert [step for step, _ in result["held_out"]] == [0, 3, 6]
    assert any(bool((first[name] != tensor).any()) for name, tensor in adapter(run).items())


def test_a_run_from_an_adapter_starts_where_that_ended_and_goes_on_without_its_folder(
    train: TrainRun, model: Path, folder: Path, alone: RunDir
) -> None:
    import shutil

    start = folder / "peft"
    shutil.copytree(alone.adapter, start)
    job = dummy_job(model, folder / "second", gpus=1, **DOTTED, micro_batch=2, adapter=str(start))
    run = train(job)
    result, before = run.result(), alone.result()
    assert result is not None
    assert before is not None
    assert result["held_out"][0] == [0, before["held_out"][-1][1]]
    assert load(run.checkpoint(2))[0].optimizer_steps == 2
    shutil.rmtree(start)
    again = copied(run, folder / "second-again", up_to=2)
    train(prepare.prepare_resume(again, {}))
    assert furthest(again, run) == 0.0


# --- real processes -----------------------------------------------------------------------------------------------


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch() -> Iterator[Launch]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "qdist", "launch", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
            preexec_fn=hears_signals,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def flags(model: Path, run: Path, *, ranks: int = 2, **more: Any) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in {**SHAPE, **more}.items()]
    return ["--model", str(model), "--load-format", "dummy", "--gpus", str(ranks), "--run", str(run), *settings]


def processes(run: Path) -> dict[int, str]:
    """Command lines of all processes that name the run directory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(run) in line and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = line
    return found


def rank_process(run: Path, rank: int) -> int:
    for process, line in processes(run).items():
        if "qdist.runtime.train.worker" not in line:
            continue
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return process
    raise AssertionError(f"no process of rank {rank} among {processes(run)}")


def wait_until(
    true: Callable[[], bool], what: str, *, process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Poll; a process that ends before `true` holds has failed, and shows what it said."""
    end = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{what}: exit code {process.returncode}\n{process.communicate()[0]}")
        assert time.monotonic() < end, what
        time.sleep(0.02)


def nothing_left(run: Path) -> None:
    wait_until(lambda: not processes(run), f"left behind: {processes(run)}", seconds=10)


STEPS = 80
"""Enough that a kill comes long before the end."""
LONG = {"steps": STEPS, "train.save_steps": 4}


@pytest.fixture(scope="module")
def never_killed(train: TrainRun, model: Path, folder: Path) -> RunDir:
    return train(
        dummy_job(model, folder / "never-killed", gpus=2, **{**DOTTED, "steps": STEPS, "train__save_steps": 100})
    )


@pytest.mark.parametrize("victim", ["rank 1", "the launcher"])
def test_a_killed_run_leaves_nothing_behind_and_resumes_with_the_same_losses(
    launch: Launch, train: TrainRun, model: Path, folder: Path, never_killed: RunDir, victim: str
) -> None:
    run = RunDir(folder / f"killed-{victim.replace(' ', '-')}")
    process = launch(*flags(model, run.path, **LONG))
    wait_until(lambda: bool(run.checkpoint_steps()), "no checkpoint came", process=process)
    if victim == "rank 1":
        os.kill(rank_process(run.path, 1), signal.SIGKILL)
    else:
        process.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 130)
    nothing_left(run.path)
    assert run.result() is None
    assert losses_of(run)
    if victim == "rank 1":
        assert "rank 1 was killed by SIGKILL" in said
    if victim != "the launcher":
        assert f"qdist launch --resume --run {run.path}" in said
    train(prepare.prepare_resume(run, {"train": {"save_steps": 1000}}))
    assert losses_of(run) == losses_of(never_killed)
    assert furthest(run, never_killed) == 0.0


def test_ctrl_c_saves_and_the_rest_runs_to_its_end_and_says_when_it_is_finished(
    launch: Launch, model: Path, folder: Path, never_killed: RunDir
) -> None:
    run = RunDir(folder / "interrupted")
    process = launch(*flags(model, run.path, **{**LONG, "train.save_steps": 1000}))
    wait_until(lambda: len(losses_of(run)) > 3, "no step came", process=process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    nothing_left(run.path)
    (step,) = run.checkpoint_steps()
    assert f"the checkpoint of step {step} is saved" in said
    resumed = launch("--resume", "--run", run.path)
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert f"from step {step}" in said
    assert losses_of(run) == losses_of(never_killed)
    again = launch("--resume", "--run", run.path)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert f"is finished: {STEPS} steps" in said


def test_ctrl_c_while_the_ranks_are_starting_ends_them_at_once_and_the_run_can_go_on(
    launch: Launch, model: Path, folder: Path
) -> None:
    run = RunDir(folder / "interrupted-early")
    process = launch(*flags(model, run.path))
    wait_until(
        lambda: any("qdist.runtime.train.worker" in line for line in processes(run.path).values()), "no rank came"
    )
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, losses_of(run)) == (130, {}), said
    assert "stopped before the first step; nothing to save" in said
    assert "Traceback" not in said
    nothing_left(run.path)
    assert state_of(run) == "stopped"
    assert prepare.prepare_resume(run, {}).plan == run.plan()


def test_ctrl_c_while_model_and_data_are_prepared_leaves_neither_a_run_nor_a_traceback(
    launch: Launch, folder: Path
) -> None:
    run, data = folder / "interrupted-preparing", save_data(folder / "preparing.jsonl")
    process = launch("--model", save_model(folder / "whole"), "--data", data, "--gpus", "1", "--run", run)
    wait_until(lambda: "Prepare" in children_of(process.pid), "nothing was prepared", process=process)
    for each in (process.pid, *children_of(process.pid).values()):  # as a terminal does
        os.kill(each, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped\n")
    assert not run.exists()


def children_of(parent: int) -> dict[str, int]:
    """The jobs that a process has done in processes of their own, and the numbers of these."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            words = (path / "cmdline").read_text().split("\0")
            if int(fields[1]) == parent and "qdist.runtime.tasks" in words:
                found[words[words.index("qdist.runtime.tasks") + 1]] = int(path.name)
    return found


def test_a_rank_that_fails_shows_its_last_lines(launch: Launch, model: Path, folder: Path) -> None:
    """A learning rate that no adapter survives."""
    run = folder / "broken"
    process = launch(*flags(model, run, ranks=1, **{"optim.lr": 1e30, "optim.clip": 0}))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search("the loss is (nan|inf) at step|gradients are NaN or infinite at step", said)
    assert "  | error: " in said
    assert "try: a smaller --set optim.lr in a new run" in said
    assert state_of(RunDir(run)) == "failed"
    nothing_left(run)


def test_a_stopped_rank_is_named_with_stacks_and_the_run_goes_on_from_its_checkpoint(
    launch: Launch, train: TrainRun, model: Path, folder: Path, never_killed: RunDir
) -> None:
    run = RunDir(folder / "stopped")
    process = launch(*flags(model, run.path, **{**LONG, "train.stuck_seconds": 3, "train.save_steps": 20}))
    # Well between two checkpoints: a rank that waits in one is said to be writing, and not to stand still.
    wait_until(lambda: max(losses_of(run), default=0) > 20, "no step behind a checkpoint came", process=process)
    assert run.checkpoint_steps()
    assert state_of(run) == "running"
    os.kill(rank_process(run.path, 1), signal.SIGSTOP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"error: rank 1 has been silent for \d+ s: its process is stopped", said), said
    assert "rank 0 stands still as well; stacks of rank 0, 1 are in" in said
    assert f"the last checkpoint is of step {run.checkpoint_steps()[-1]}" in said
    assert "loop.py" in run.stack_file(0).read_text()
    nothing_left(run.path)
    ended = run.ended()
    assert ended is not None
    assert (ended.state, state_of(run)) == ("failed", "failed")
    train(prepare.prepare_resume(run, {"train": {"save_steps": 1000}}))
    assert losses_of(run) == losses_of(never_killed)
