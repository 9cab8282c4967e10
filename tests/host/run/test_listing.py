"""Are runs found, told apart truthfully, and read quickly, whatever lies in their folders?"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import RunError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.history import RunHistory
from qdist.host.files import write_atomic
from qdist.host.run.listing import Listed, find, listed, skim
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import Ended, RunDir
from qdist.host.run.state import state_of
from tests.plans import CPU, gpus, planned

PLAN = planned("smollm2-135m", CPU, {"gpus": 2})


def made(path: Path, plan: Plan = PLAN) -> RunDir:
    """A run that was planned and no more."""
    run = RunDir(path)
    run.events.mkdir(parents=True)
    (path / "plan.json").write_bytes(msgspec.json.encode(plan))
    return run


def told(run: RunDir, *events: Event, rank: int = 0) -> None:
    with run.event_file(rank).open("ab") as file:
        file.write(b"".join(map(encode, events)))


def step(number: int, *, time: float = 0.0, loss: float = 2.0) -> Event:
    return Event(kind="step", step=number, total_steps=5, loss=loss, tokens=100, seconds=0.5, time=time or number)


def only(folder: Path) -> Listed:
    (row,) = listed(find([folder]))
    return row


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path/run`, as a launcher does."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom qdist.host.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    made(tmp_path / "run")
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_without_events_is_planned_and_says_nothing_else(tmp_path: Path) -> None:
    made(tmp_path / "run")
    row = only(tmp_path)
    assert (row.state, row.model, row.step, row.steps, row.started) == ("planned", "smollm2-135m", 0, 5, None)
    assert (row.loss, row.tokens_per_s, row.gpu_hours, row.cpu_rank_hours) == (None, None, None, None)


def test_a_held_lock_is_running_and_one_let_go_by_a_kill_is_killed(
    tmp_path: Path, locked: subprocess.Popen[str]
) -> None:
    told(RunDir(tmp_path / "run"), Event(kind="start", time=1.0), step(1, loss=3.0), step(2, loss=1.0))
    row = only(tmp_path)
    assert (row.state, row.step, row.loss, row.tokens_per_s) == ("running", 2, 2.0, 200.0)
    locked.kill()
    locked.wait()
    assert only(tmp_path).state == "killed"


def test_a_run_that_finishes_while_one_looks_is_not_killed(tmp_path: Path) -> None:
    told(made(tmp_path / "run"), step(5))
    results: list[dict[str, int] | None] = [None, {"steps": 5}]

    class Finishing(RunDir):
        def result(self) -> dict[str, int] | None:
            return results.pop(0)

    assert state_of(Finishing(tmp_path / "run")) == "finished"


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_launch_that_ended_early_says_how_and_only_a_failure_why(tmp_path: Path, state: str) -> None:
    run = made(tmp_path / "run")
    told(run, Event(kind="start", time=1.0), step(1))
    ended = Ended(state=state, message="rank 1 died:\n  | a stack", time=5.0)  # type: ignore[arg-type]
    write_atomic(run.path / "ended.json", msgspec.json.encode(ended))
    row = only(tmp_path)
    assert (row.state, row.why) == (state, "rank 1 died:" if state == "failed" else "")


def test_a_finished_run_tells_the_speed_that_its_result_holds(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    told(run, Event(kind="start", time=1.0), step(5), Event(kind="eval", step=5, held_out_loss=1.5, time=6.0))
    write_atomic(run.path / "result.json", b'{"steps": 5, "tokens_per_s": {"measured": 777.0}}')
    row = only(tmp_path)
    assert (row.state, row.tokens_per_s, row.held_out_loss, row.step) == ("finished", 777.0, 1.5, 5)


def test_hours_count_every_launch_and_every_gpu_but_not_the_time_between(tmp_path: Path) -> None:
    run = made(tmp_path / "run", planned("llama-7b", gpus(4, 80.0)))
    told(run, Event(kind="load", seconds=100.0, time=1100.0), Event(kind="start", time=1100.0), step(1, time=2800.0))
    told(run, Event(kind="resume", step=1, time=90_000.0), step(2, time=91_800.0))
    row = only(tmp_path)
    assert (row.device, row.cpu_rank_hours, row.started) == ("cuda", None, 1000.0)
    assert row.gpu_hours == pytest.approx(4 * (1800 + 1800) / 3600)


def test_hours_of_cpu_processes_are_not_gpu_hours(tmp_path: Path) -> None:
    told(made(tmp_path / "run"), Event(kind="start", time=1000.0), step(1, time=2800.0))
    row = only(tmp_path)
    assert (row.gpu_hours, row.cpu_rank_hours) == (None, 1.0)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("plan.json", b'{"version": 1}', "planned by another qdist (plan version 1"),
        ("plan.json", b"[]", "is not a JSON object"),
        ("plan.json", b"{", "is not JSON"),
        ("plan.json", b"\xff\x80", "is not text"),
        ("result.json", b"{", "is not JSON"),
        ("result.json", b'{"tokens_per_s": 3}', "Expected `object`, got `int`"),
        ("ended.json", b'{"state": "exploded", "time": 1}', "exploded"),
    ],
)
def test_what_cannot_be_read_is_listed_with_the_reason_beside_the_others(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    made(tmp_path / "whole")
    broken = made(tmp_path / "broken")
    (broken.path / name).write_bytes(content)
    rows = {Path(row.path).name: row for row in listed(find([tmp_path]))}
    assert (rows["broken"].state, rows["whole"].state) == ("unreadable", "planned")
    assert why in rows["broken"].why


def test_runs_are_found_two_levels_deep_but_not_inside_each_other_or_hidden(tmp_path: Path) -> None:
    for name in ("a", "sweep/b", "sweep/deep/c", "a/merged", ".trash/d"):
        made(tmp_path / name)
    assert find([tmp_path]) == [tmp_path / "a", tmp_path / "sweep/b"]
    assert find([tmp_path / "a", tmp_path]) == [tmp_path / "a", tmp_path / "sweep/b"]
    assert find([tmp_path / "sweep"]) == [tmp_path / "sweep/b", tmp_path / "sweep/deep/c"]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is not a folder"):
        find([tmp_path / "nowhere"])


def test_the_newest_comes_first(tmp_path: Path) -> None:
    told(made(tmp_path / "old"), Event(kind="start", time=1000.0))
    told(made(tmp_path / "new"), Event(kind="start", time=3000.0))
    os.utime(made(tmp_path / "planned").path / "plan.json", (2000, 2000))
    assert [Path(row.path).name for row in listed(find([tmp_path]))] == ["new", "planned", "old"]


def long_log(run: RunDir, steps: int) -> None:
    """Three launches, evaluations on the way."""
    third = steps // 3
    for launch, kind in enumerate(("start", "resume", "resume")):
        first, began = launch * third, 10_000.0 * launch
        told(run, Event(kind="load", seconds=5.0, time=began), Event(kind=kind, step=first, time=began))  # type: ignore[arg-type]
        told(run, *(step(first + number, time=began + number, loss=1 + number) for number in range(1, third)))
        told(run, Event(kind="eval", step=first + third, held_out_loss=3.0 - launch, time=began + third))
        told(run, Event(kind="checkpoint", step=first + third, time=began + third + 7))


@pytest.mark.parametrize("steps", [9, 600, 6000])
def test_skimming_says_what_reading_everything_says(tmp_path: Path, steps: int) -> None:
    run, whole = made(tmp_path / "run"), RunHistory()
    long_log(run, steps)
    told(run, Event(kind="end", step=steps, time=50_000.0))
    Follower(run.path).fold_into(whole)
    quick = skim(run)
    assert (quick.stretches, quick.held_out, quick.finished) == (whole.stretches, whole.held_out, True)
    assert len(quick.stretches) == 3
    assert (quick.step, quick.smoothed_loss, quick.loss) == (whole.step, whole.smoothed_loss, whole.loss)
    assert quick.tokens_per_s == whole.tokens_per_s
    assert steps < 6000 or len(quick.columns) < len(whole.columns) / 3


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    told(run, Event(kind="start", time=1.0), step(1))
    with run.event_file(0).open("ab") as file:
        file.write(encode(step(2))[:-9])
    assert skim(run).step == 1


def test_a_long_log_takes_no_longer_than_a_glance(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    long_log(run, 3000)
    block = run.event_file(0).read_bytes()
    run.event_file(0).write_bytes(block * (40_000_000 // len(block)))
    began = time.perf_counter()
    skim(run)
    assert time.perf_counter() - began < 1.0  # folding all of it takes some seconds
