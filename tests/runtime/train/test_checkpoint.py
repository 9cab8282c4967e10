"""Checkpoints are whole or absent, and the right ones are kept."""

import errno
import os
import random
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from qdist.core.errors import RunError
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.adamw import MOMENTS
from qdist.runtime.engine.torch import State
from qdist.runtime.train import checkpoint
from qdist.runtime.train.checkpoint import Progress, load, note, prune, save


def state_of(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    parameters = {name: torch.randn(3, 5, generator=generator) for name in ("layer.a.weight", "layer.b.weight")}
    moments = {
        moment: {name: torch.randn(3, 5, generator=generator) for name in parameters} if step else {}
        for moment in MOMENTS
    }
    return State(parameters, moments if step else {}, step)


def progress_of(step: int, held_out: tuple[tuple[int, float], ...] = ()) -> Progress:
    return Progress(step=step, samples=step * 16, optimizer_steps=step, held_out=held_out)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.mark.parametrize("step", [0, 1, 250])
def test_what_is_saved_is_what_is_loaded(run: RunDir, step: int) -> None:
    progress = Progress(
        step=step, samples=7, optimizer_steps=step, loss_scale=2.0**13, finite_steps=4, held_out=((0, 2.5), (1, 1 / 3))
    )
    saved = state_of(step)
    found, state = load(save(run, progress, saved, keep=2))
    assert found == progress
    assert state.optimizer_steps == step
    assert state.parameters.keys() == saved.parameters.keys()
    assert all(torch.equal(state.parameters[name], saved.parameters[name]) for name in saved.parameters)
    assert state.moments.keys() == saved.moments.keys()
    for moment, named in saved.moments.items():
        assert all(torch.equal(state.moments[moment][name], value) for name, value in named.items())


def test_a_checkpoint_holds_four_files_and_no_sign_of_a_world_size(run: RunDir) -> None:
    folder = save(run, progress_of(3), state_of(3), keep=2)
    assert folder.name == "step_000003"
    assert sorted(file.name for file in folder.iterdir()) == [
        "DONE", "adapter.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert "world" not in (folder / "state.json").read_text()


def test_one_without_done_is_refused_and_not_counted(run: RunDir) -> None:
    save(run, progress_of(1), state_of(1), keep=5)
    folder = save(run, progress_of(2), state_of(2), keep=5)
    (folder / "DONE").unlink()
    with pytest.raises(RunError, match=r"step_000002 has no DONE"):
        load(folder)
    assert run.checkpoint_steps() == [1]


def test_one_without_done_is_written_again(run: RunDir) -> None:
    folder = save(run, progress_of(2), state_of(1), keep=5)
    (folder / "DONE").unlink()
    save(run, progress_of(2), state_of(2), keep=5)
    assert torch.equal(load(folder)[1].parameters["layer.a.weight"], state_of(2).parameters["layer.a.weight"])


def test_a_whole_one_is_not_written_again(run: RunDir) -> None:
    folder = save(run, progress_of(2), state_of(1), keep=5)
    before = (folder / "adapter.safetensors").stat().st_mtime_ns
    save(run, progress_of(2), state_of(2), keep=5)
    assert (folder / "adapter.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("kept", [0, 1, 50])
def test_a_torn_file_is_an_error_that_names_it(run: RunDir, name: str, kept: int) -> None:
    folder = save(run, progress_of(2), state_of(2), keep=5)
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    with pytest.raises(RunError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_is_an_error_that_names_it(run: RunDir, name: str) -> None:
    folder = save(run, progress_of(2), state_of(2), keep=5)
    (folder / name).unlink()
    with pytest.raises(RunError, match=name):
        load(folder)


@pytest.mark.parametrize(
    ("keep", "held_out", "kept"),
    [
        (1, (), [5]),
        (2, (), [4, 5]),
        (9, (), [1, 2, 3, 4, 5]),
        (2, ((0, 0.1), (2, 1.0), (4, 1.5)), [2, 4, 5]),
        (2, ((0, 0.1), (1, 2.0), (5, 1.0)), [4, 5]),
        (1, ((2, 1.0), (4, 1.0)), [2, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    run: RunDir, keep: int, held_out: tuple[tuple[int, float], ...], kept: list[int]
) -> None:
    for step in range(1, 6):
        so_far = tuple(point for point in held_out if point[0] <= step)
        save(run, progress_of(step, so_far), state_of(step), keep=keep)
    assert run.checkpoint_steps() == kept
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step_{step:06d}" for step in kept]


def test_what_a_kill_left_hidden_is_ignored_and_then_cleaned(run: RunDir) -> None:
    save(run, progress_of(1), state_of(1), keep=5)
    leftover = run.checkpoints / ".step_000002.4711"
    leftover.mkdir()
    (leftover / "adapter.safetensors").write_bytes(b"half")
    (leftover / "DONE").touch()
    assert run.checkpoint_steps() == [1]
    save(run, progress_of(2), state_of(2), keep=5)
    assert not leftover.exists()
    assert run.checkpoint_steps() == [1, 2]


def test_a_leftover_of_this_very_process_does_not_stand_in_the_way(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container gives a restarted rank the same process id."""
    run.checkpoints.mkdir()
    monkeypatch.setattr("os.getpid", lambda: 4711)
    (run.checkpoints / ".step_000002.4711").mkdir()
    save(run, progress_of(2), state_of(2), keep=5)
    assert run.checkpoint_steps() == [2]


def test_a_kill_while_an_old_one_is_deleted_leaves_none_of_its_name(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, progress_of(1), state_of(1), keep=1)

    def killed(folder: Path, **_: object) -> None:
        if folder.is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(run, progress_of(2), state_of(2), keep=1)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == [f".step_000001.{os.getpid()}", "step_000002"]
    prune(run, keep=1, best=None)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000002"]


def test_what_others_put_beside_checkpoints_stays(run: RunDir) -> None:
    for name in ("step_000001-keep", ".step_000001.bak", ".step_1.4711"):
        (run.checkpoints / name).mkdir(parents=True)
    save(run, progress_of(2), state_of(2), keep=1)
    assert len([*run.checkpoints.iterdir()]) == 4


def test_an_evaluation_is_never_half_written_inside_a_checkpoint(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    step = save(run, progress_of(2), state_of(2), keep=1)
    there = {path.name for path in step.iterdir()}

    def killed(*_: object) -> None:
        assert {path.name for path in step.iterdir()} == there
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            note(run, progress_of(2, ((2, 1.5),)), keep=1)


def test_one_that_cannot_be_written_leaves_nothing_and_says_where_a_run_goes_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, progress_of(5), state_of(5), keep=2)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(
        RunError, match=r"of step 10 cannot be written .*No space left.*; the last .* of step 5"
    ) as caught:
        save(run, progress_of(10), state_of(10), keep=2)
    assert str(caught.value.try_).endswith(f"qdist launch --resume --run {run.path}")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000005"]


def test_an_evaluation_after_a_checkpoint_is_added_to_it_and_decides_what_is_kept(run: RunDir) -> None:
    for step in (1, 2, 3):
        save(run, progress_of(step, ((0, 9.0), (1, 5.0))), state_of(step), keep=1)
    assert run.checkpoint_steps() == [1, 3]
    note(run, progress_of(3, ((0, 9.0), (1, 5.0), (3, 4.0))), keep=1)
    assert run.checkpoint_steps() == [3]
    progress, _ = load(run.checkpoint(3))
    assert (progress.step, progress.best_step, progress.held_out[-1]) == (3, 3, (3, 4.0))


def test_an_evaluation_of_tasks_is_added_with_what_the_best_is_chosen_by(run: RunDir) -> None:
    task = "mmlu:a.jsonl"
    for step in (1, 2, 3):
        points = tuple((own, 0.5 if own == 1 else 0.25) for own in range(1, step + 1))
        progress = Progress(step=step, samples=0, tasks={task: points}, best=task, rising=(task,))
        before = replace(progress, tasks={task: points[:-1]})
        save(run, before, state_of(step), keep=1)
        note(run, progress, keep=1)
        assert load(run.checkpoint(step))[0] == progress
    assert run.checkpoint_steps() == [1, 3]
    folder = run.checkpoint(3)
    (folder / "held_out.json").write_bytes((folder / "held_out.json").read_bytes().replace(b"0.25", b"0.75"))
    with pytest.raises(RunError, match="not as it was saved"):
        load(folder)


def test_a_broken_one_is_named_and_the_one_before_offered(run: RunDir) -> None:
    save(run, progress_of(1), state_of(1), keep=5)
    folder = save(run, progress_of(2), state_of(2), keep=5)
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"optimizer\.safetensors is not as it was saved") as caught:
        load(folder)
    move, _, rest = caught.value.try_.rpartition(": ")
    assert rest == "the newest checkpoint is then that of step 1"
    subprocess.run(shlex.split(move), check=True)
    assert run.checkpoint_steps() == [1]
    assert load(run.checkpoint(1))[0] == progress_of(1)
    (run.checkpoint(1) / "state.json").unlink()
    with pytest.raises(RunError, match=r"has no state\.json") as caught:
        load(run.checkpoint(1))
    assert caught.value.try_.endswith(": the run then begins anew")


def test_one_of_a_qdist_that_kept_no_sums_is_taken_as_it_is(run: RunDir) -> None:
    folder = save(run, progress_of(2), state_of(2), keep=5)
    (folder / "DONE").write_bytes(b"")
    note(run, progress_of(2, ((2, 1.5),)), keep=5)
    assert load(folder)[0].held_out == ((2, 1.5),)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_the_note_of_an_evaluation_leaves_a_whole_checkpoint(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = save(run, progress_of(2, ((0, 9.0),)), state_of(2), keep=5)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if moment == "after":
            replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        note(run, progress_of(2, ((0, 9.0), (2, 1.5))), keep=5)
    monkeypatch.undo()
    assert load(folder)[0].held_out == (((0, 9.0), (2, 1.5)) if moment == "after" else ((0, 9.0),))
    (run.checkpoints / ".held_out.json.0a1b2c3d.tmp").touch()  # as SIGKILL leaves it, beside the checkpoint
    note(run, progress_of(2, ((0, 9.0), (2, 1.5))), keep=5)
    assert [path.name for path in run.checkpoints.iterdir()] == [folder.name]


def test_of_300_single_bit_flips_each_is_named(run: RunDir) -> None:
    folder = save(run, progress_of(2), state_of(2), keep=5)
    note(run, progress_of(2, ((0, 9.0), (2, 1 / 3))), keep=5)
    draw = random.Random(7)
    files = sorted(folder.iterdir())
    for number in range(300):
        file = files[number % len(files)]
        whole = file.read_bytes()
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with pytest.raises(RunError):
            load(folder)
        file.write_bytes(whole)
    assert load(folder)[0].best_step == 2
