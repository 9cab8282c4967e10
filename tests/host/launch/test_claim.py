"""Is a run directory one launch's own, is what another did there seen, and is what a kill left no obstacle?"""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import JobError, RunError
from qdist.core.spec.run_spec import RunSpec, nest, resolve
from qdist.host.launch import claim, prepare
from qdist.host.launch.claim import claimed
from qdist.host.launch.prepare import Launch
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import is_anothers, state_of

SMALL = {"model": "smollm2-135m", "load_format": "dummy", "steps": 5, "seq_len": 64, "global_batch": 8, "gpus": 1}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def spec(**settings: Any) -> RunSpec:
    return resolve(SMALL, nest({key.replace("__", "."): value for key, value in settings.items()}))


def job(**settings: Any) -> Launch:
    return prepare.prepare(spec(run="run", **settings))


def seed_of(run: RunDir) -> int:
    return run.plan().spec.seed


def test_of_two_launches_on_one_directory_the_second_is_told_and_changes_nothing() -> None:
    first, second = job(seed=1), job(seed=2)
    with claimed(first) as own:
        with pytest.raises(RunError, match="run is being trained by another process"), claimed(second):
            pass
        assert seed_of(own.job.run) == 1
    assert "seed = 1" in Path("run/recipe.toml").read_text()


def test_a_launch_that_comes_when_the_first_has_ended_is_told_as_well() -> None:
    """Both were planned while the directory was empty."""
    first, second = job(seed=1), job(seed=2)
    claim.write(first)
    with pytest.raises(RunError, match="run holds an unfinished run with no checkpoint yet"):
        claim.write(second)
    Path("run/result.json").write_text("{}")
    with pytest.raises(RunError, match="run holds a finished run"):
        claim.write(second)
    assert seed_of(first.run) == 1


def test_of_two_launches_that_resume_a_run_the_second_is_told() -> None:
    claim.write(job())
    run = RunDir("run")
    first = prepare.prepare_resume(run, {"train": {"save_steps": 3}})
    second = prepare.prepare_resume(run, {"train": {"save_steps": 2}})
    claim.write(first)
    with pytest.raises(RunError, match="another launch has gone on with run meanwhile"):
        claim.write(second)
    assert run.plan().spec.train.save_steps == 3
    third = prepare.prepare_resume(run, {})
    Path("run/result.json").write_text("{}")
    with pytest.raises(RunError, match="another launch has finished run meanwhile"):
        claim.write(third)


def test_a_finished_run_that_goes_on_is_unfinished_until_its_new_end() -> None:
    run = claim.write(job())
    (run.checkpoint(5) / "DONE").parent.mkdir(parents=True)
    (run.checkpoint(5) / "DONE").touch()
    Path("run/result.json").write_text('{"steps": 5}')
    more = prepare.prepare_resume(run, {"steps": 8})
    assert run.result() == {"steps": 5}
    claim.write(more)
    assert (run.result(), run.plan().steps, state_of(run)) == (None, 8, "planned")


def test_names_that_qdist_chooses_are_created() -> None:
    jobs = [prepare.prepare(spec(seed=seed)) for seed in (1, 2, 3)]
    assert {str(each.run.path) for each in jobs} == {"runs/smollm2-135m-qlora-dummy"}
    runs = [claim.write(each) for each in jobs]
    assert [run.path.name for run in runs] == [f"smollm2-135m-qlora-dummy{end}" for end in ("", "-2", "-3")]
    assert [seed_of(run) for run in runs] == [1, 2, 3]


@pytest.mark.parametrize("last", ["nothing", ".lock", "events", "recipe.toml", "launch.sh"])
def test_a_folder_that_a_launch_was_killed_in_before_its_plan_may_be_used_again(last: str) -> None:
    whole = job()
    claim.write(whole)
    for name in ("plan.json", *{"nothing": [".lock", "events", "logs", "checkpoints", *whole.files]}.get(last, [])):
        path = Path("run", name)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    Path("run/.recipe.toml.ab_12345.tmp").write_text("half")
    claim.write(job(seed=7))
    assert seed_of(RunDir("run")) == 7
    assert not list(Path("run").glob(".*.tmp"))


def test_a_folder_with_anything_else_in_it_is_no_run() -> None:
    Path("run/events").mkdir(parents=True)
    Path("run/events/rank000.jsonl").touch()
    with pytest.raises(RunError, match="run exists and is not a run"):
        job()
    shutil.rmtree("run/events")
    Path("run/notes.txt").touch()
    with pytest.raises(RunError, match="run exists and is not a run"):
        job()


def test_a_directory_that_is_removed_moved_or_replaced_is_lost() -> None:
    with claimed(job()) as own:
        assert not own.is_lost()
        os.rename("run", "elsewhere")
        assert own.is_lost()
        shutil.copytree("elsewhere", "run")
        assert own.is_lost()
        shutil.rmtree("run")
        os.rename("elsewhere", "run")
        assert not own.is_lost()


def test_a_full_disk_is_an_error_of_the_job_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(claim, "write_atomic", full)
    with pytest.raises(JobError, match="run cannot be written: No space left on device"):
        claim.write(job())
    assert not Path("run").exists()


def test_each_launch_has_an_id_of_its_own_and_ranks_of_another_know_it() -> None:
    with claimed(job()) as own:
        first = own.launch
    assert not is_anothers(RunDir("run"), first)
    with claimed(prepare.prepare_resume(RunDir("run"), {})) as own:
        assert own.launch != first
        assert is_anothers(RunDir("run"), first)
    Path("run/.lock").write_text("")
    assert not is_anothers(RunDir("run"), first)


def test_what_is_being_written_by_another_process_is_left_alone(here: Path) -> None:
    claim.write(job())
    path = Path("run/.command.txt.abcdefgh.tmp")
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    claim.write(prepare.prepare_resume(RunDir("run"), {}))
    assert path.exists()
    os.close(descriptor)
    claim.write(prepare.prepare_resume(RunDir("run"), {}))
    assert not path.exists()


def test_a_run_that_has_ended_is_tidied_unless_another_process_holds_it() -> None:
    with claimed(job()) as own:
        run = own.job.run
        run.pulses.mkdir()
        (run.pulses / "rank000.new").touch()
        claim.tidy(run)
        assert (run.pulses / "rank000.new").exists()
    (run.pulses / "rank000.newer").touch()
    claim.tidy(run)
    assert [path.name for path in run.pulses.iterdir()] == ["rank000.newer"]
