"""SIGKILL at every change of the file system that one write makes: a small part of `python -m bench.chaos.writes`."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.chaos.changes import Ended, forked, obstacle, traced
from qdist.host.files import write_atomic
from qdist.host.run import calibration
from qdist.host.run.rundir import RunDir
from qdist.runtime.data import tokenized
from qdist.runtime.engine.torch import State
from qdist.runtime.formats.work_folder import built
from qdist.runtime.train import checkpoint, result
from tests.runtime.tiny import dummy_job, samples_of, save_config, written

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-")
POINTS = 7
"""Of each write that takes a moment; of the others all."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))


def zero(function: Callable[[], object]) -> int:
    function()
    return 0


def kills(function: Callable[[], object], world: Path, reset: Callable[[], object], *, most: int = 0) -> list[Ended]:
    """A fork that is killed at each of its changes in turn, or at `most` drawn ones; after each, `reset` looks."""
    log, run = world.parent / "log", partial(zero, function)
    whole = traced(run, under=world, log=log)
    assert whole.code == 0, log.read_text()
    reset()
    points = range(1, whole.changes + 1)
    found = []
    for point in sorted(random.Random(0).sample(points, most)) if 0 < most < len(points) else points:
        found.append(traced(run, under=world, log=log, kill_at=point))
        reset()
    return found


def test_a_kill_is_at_each_change_and_in_the_middle_of_each_write(tmp_path: Path) -> None:
    world, sizes = tmp_path / "world", []
    world.mkdir()

    def write() -> None:
        (world / "one").write_text("12345678")
        os.rename(world / "one", world / "two")

    def look() -> None:
        sizes.append({path.name: path.stat().st_size for path in world.iterdir()})
        for path in world.iterdir():
            path.unlink()

    ended = kills(write, world, look)
    assert [each.last for each in ended] == [
        "before openat one", "before write one", "half of write one", "before rename one two"
    ]  # fmt: skip
    assert all(each.code == -9 for each in ended)
    assert sizes == [{"two": 8}, {}, {"one": 0}, {"one": 4}, {"one": 8}]


def test_a_file_is_the_old_or_the_new_one_and_the_next_write_leaves_nothing_else(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    path = world / "state.json"
    path.write_text("old")

    def look() -> None:
        assert path.read_text() in ("old", "the new one")
        write_atomic(path, "old")
        assert [file.name for file in world.iterdir()] == ["state.json"]

    ended = kills(partial(write_atomic, path, "the new one"), world, look)
    assert ended[-1].last.startswith("before rename .state.json.")


def test_tokens_are_whole_or_absent_and_a_killed_writer_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    world, wanted = tmp_path / "world", samples_of([5, 6])
    world.mkdir()
    path = world / "data.safetensors"
    save = partial(tokenized.save, wanted, path, key="k")

    def look() -> None:
        if path.exists():
            assert torch.equal(tokenized.load(path, key="k").tokens, wanted.tokens)
            path.unlink()
        save()
        assert [file.name for file in world.iterdir()] == [path.name]
        path.unlink()

    kills(save, world, look)


def test_an_output_is_whole_without_a_trace_of_the_work_and_built_by_the_next_command(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    out = world / "out"

    def build() -> None:
        if out.is_dir():
            return  # the command would say that it exists
        with built(out, "a model") as work:
            for name in ("one", "two"):
                if not (work / f".{name}.json").is_file():
                    (work / name).write_text(name * 9)
                    (work / f".{name}.json").write_text("{}")

    def look() -> None:
        if out.is_dir():
            assert sorted(file.name for file in out.iterdir()) == ["one", "two"]
        build()
        assert [file.name for file in world.iterdir()] == ["out"]
        assert {file.name: file.read_text() for file in out.iterdir()} == {"one": "one" * 9, "two": "two" * 9}
        for file in out.iterdir():
            file.unlink()
        out.rmdir()

    kills(build, world, look)


def test_a_lesson_is_a_line_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / "lessons.jsonl"
    append = partial(calibration._append_line, path, b'{"a": 1}')

    def look() -> None:
        calibration._append_line(path, b'{"b": 2}')
        assert path.read_bytes().splitlines()[-1] == b'{"b": 2}'
        path.unlink()

    kills(append, tmp_path / "cache", look)


def state(value: float) -> State:
    """Of an adapter of one linear that moved."""
    names = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
             "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")  # fmt: skip
    parameters = {name: torch.full((4, 8), value) for name in names}
    return State(parameters, {"exp_avg": parameters}, 2)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With a checkpoint of step 2 and its adapter."""
    made = written(dummy_job(save_config(tmp_path / "model"), tmp_path / "world", steps=4))
    checkpoint.save(made, checkpoint.Progress(step=2, samples=8), state(2.0), keep=1)
    result.gather(made, step=2)
    return made


def test_checkpoints_are_whole_while_others_are_saved_and_removed(run: RunDir) -> None:
    save = partial(checkpoint.save, run, checkpoint.Progress(step=4, samples=16), state(4.0), keep=1)

    def look() -> None:
        assert run.checkpoint_steps()
        for step in run.checkpoint_steps():
            progress, found = checkpoint.load(run.checkpoint(step))
            assert progress.step == step
            assert all((tensor == step).all() for tensor in found.parameters.values())
        save()
        assert run.checkpoint_steps() == [4]
        checkpoint.save(run, checkpoint.Progress(step=6, samples=24), state(6.0), keep=1)
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_000006"]
        checkpoint._remove(run.checkpoint(6))
        checkpoint.save(run, checkpoint.Progress(step=2, samples=8), state(2.0), keep=1)

    kills(save, run.path, look, most=POINTS)


def test_a_run_has_the_old_adapter_or_the_new_one_while_it_is_gathered(run: RunDir) -> None:
    checkpoint.save(run, checkpoint.Progress(step=4, samples=16), state(4.0), keep=2)
    gather, there = partial(result.gather, run, step=4), {path.name for path in run.path.iterdir()}

    def look() -> None:
        found = load_file(run.adapter / "adapter_model.safetensors")
        assert {float(tensor.unique()) for tensor in found.values()} in ({2.0}, {4.0})
        assert not [path for path in run.adapter.iterdir() if path.name.startswith(".")]
        gather()
        assert {path.name for path in run.path.iterdir()} == there
        result.gather(run, step=2)

    kills(gather, run.path, look, most=POINTS)


def test_a_fork_that_is_not_killed_says_how_it_ended(tmp_path: Path) -> None:
    assert forked(lambda: 3, log=tmp_path / "log") == 3
    assert forked(lambda: 0, log=tmp_path / "log") == 0
