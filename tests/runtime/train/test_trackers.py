"""Do trackers get the numbers of a run, go on where it goes on, and stop nothing when they fail?"""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from qdist.core.errors import MachineError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event, encode
from qdist.core.text import GIB
from qdist.host.launch.trackers import PACKAGES, refuse_missing
from qdist.host.run.rundir import RunDir
from qdist.runtime.train import trackers
from qdist.runtime.train.trackers import FullestRank, Guarded, Trackers, start, values_of
from tests.plans import CPU, planned


class Fake:
    """A tracker that keeps what it is given, and fails when told to."""

    def __init__(self, *, fails: Exception | None = None) -> None:
        self.fails, self.finished = fails, False
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] | None = None

    def start(self) -> None:
        self._fail()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        self._fail()
        self.rows.append((step, values))

    def finish(self) -> None:
        self._fail()
        self.finished = True

    def _fail(self) -> None:
        if self.fails:
            raise self.fails


def plan_with(*names: str) -> Plan:
    return planned("smollm2-135m", CPU, {"trackers": names, "lora.targets": ("q_proj", "v_proj")})


def made(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.events.mkdir(parents=True, exist_ok=True)
    return run


def step(number: int, **more: Any) -> Event:
    return Event(kind="step", step=number, loss=2.0, learning_rate=1e-4, tokens=75, padding=25, seconds=0.5, **more)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """W&B replaced: 'tracker' is what starts, 'known as' what it was asked to go on in."""
    made: dict[str, Any] = {"tracker": Fake()}

    def make(run: RunDir, known_as: str) -> tuple[Any, str]:
        made["known as"] = known_as
        return made["tracker"], known_as or "id-1"

    monkeypatch.setitem(trackers._MAKERS, "wandb", make)
    monkeypatch.setattr(trackers, "_OWN_FAILURES", {})
    monkeypatch.setattr(trackers, "refuse_missing", lambda names: None)
    return made


def test_a_step_has_loss_speed_padding_data_time_and_memory() -> None:
    event = step(3, gradient_norm=0.5, data_s=0.125, memory_bytes=2 * GIB)
    assert values_of(event, fullest_bytes=3 * GIB) == {
        "loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 0.5, "seconds": 0.5, "data_seconds": 0.125,
        "tokens_per_second": 150.0, "padding_share": 0.25, "memory_peak_gib": 2.0, "memory_peak_fullest_gib": 3.0,
    }  # fmt: skip


def test_an_evaluation_has_its_loss_and_other_events_nothing() -> None:
    event = Event(kind="eval", step=3, held_out_loss=1.5, memory_bytes=GIB)
    assert values_of(event) == {"held_out_loss": 1.5, "memory_peak_gib": 1.0, "memory_peak_fullest_gib": 1.0}
    assert values_of(Event(kind="checkpoint", step=3, memory_bytes=GIB)) == {}


def test_a_step_of_no_time_has_no_speed() -> None:
    assert "tokens_per_second" not in values_of(Event(kind="step", step=1, tokens=5))


def test_the_fullest_rank_is_looked_up_now_and_then_in_the_last_line_of_each(tmp_path: Path) -> None:
    run, now = made(tmp_path), [0.0]
    fullest = FullestRank(run, 2, clock=lambda: now[0])
    assert fullest() == 0
    lines = [encode(Event(kind="start", note="x" * 3000, memory_bytes=99)), encode(step(1, memory_bytes=9)) * 20]
    run.event_file(1).write_bytes(b"".join(lines) + encode(step(2, memory_bytes=7))[:-5])
    run.event_file(0).write_bytes(encode(step(1, memory_bytes=8)))
    run.event_file(2).write_bytes(encode(step(1, memory_bytes=99)))  # of an earlier launch with more ranks
    assert fullest() == 0
    now[0] = 10.0
    assert fullest() == 9


def test_the_settings_are_kept_once_and_a_resumed_run_goes_on(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run, plan = made(tmp_path), plan_with("wandb")
    start(plan, run, rank=0)
    assert fakes["known as"] == ""
    settings = fakes["tracker"].settings
    assert (settings["optim.lr"], settings["lora.targets"]) == (2e-4, "q_proj,v_proj")
    assert {type(value) for value in settings.values()} <= {int, float, str, bool}
    fakes["tracker"] = Fake()
    start(plan, run, rank=0)
    assert (fakes["known as"], fakes["tracker"].settings) == ("id-1", None)


def test_other_ranks_and_runs_without_trackers_start_none(tmp_path: Path, fakes: dict[str, Any]) -> None:
    for plan, rank in ((plan_with("wandb"), 1), (plan_with(), 0)):
        tracked = start(plan, made(tmp_path), rank=rank)
        tracked.log(step(1))
        assert tracked.finish() == ""
    assert "known as" not in fakes
    assert not (tmp_path / "run/trackers.json").exists()


def test_a_tracker_that_does_not_start_is_an_error(tmp_path: Path, fakes: dict[str, Any]) -> None:
    fakes["tracker"] = Fake(fails=OSError("no route to host\nand a stack"))
    with pytest.raises(RunError, match=r"^the tracker wandb did not start: OSError: no route to host\n  try: WANDB_M"):
        start(plan_with("wandb"), made(tmp_path), rank=0)


def test_a_failure_is_told_once_leaves_the_tracker_alone_for_longer_each_time_and_is_summed_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now, broken, well = [0.0], Fake(fails=sqlite3.OperationalError("disk full")), Fake()
    guarded = Guarded("tensorboard", broken, clock=lambda: now[0])
    tracked = Trackers([guarded, Guarded("tensorboard", well)], fullest=lambda: 0)
    for second in range(200):
        now[0] = float(second)
        if second == 100:
            broken.fails = None
        tracked.log(step(second))
    assert [number for number, _ in well.rows] == list(range(200))
    # Asked at 0 s, at 60 s, and two minutes later, when it was well again.
    assert [number for number, _ in broken.rows] == list(range(180, 200))
    said = tracked.finish()
    assert said == "tracker tensorboard lost 180 of 200 entries: OperationalError: disk full"
    assert (well.finished, tracked.finish()) == (True, "")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: the tracker tensorboard failed and is asked again in 1 min 00 s: Operational")


def test_nobody_waits_for_a_tracker_in_its_own_thread_but_the_end() -> None:
    held, slow = threading.Event(), Fake()
    plain = slow.log
    slow.log = lambda values, step: (held.wait(10), plain(values, step))[1]  # type: ignore[method-assign]
    guarded = Guarded("tensorboard", slow, thread=ThreadPoolExecutor(1))
    for number in (1, 2, 3):
        guarded.log({"loss": 1.0}, number)
    assert slow.rows == []
    held.set()
    assert guarded.finish() == ""
    assert ([number for number, _ in slow.rows], slow.finished) == ([1, 2, 3], True)


def test_a_bug_of_ours_is_not_taken_for_a_failure() -> None:
    with pytest.raises(AssertionError):
        Guarded("tensorboard", Fake(fails=AssertionError())).log({"loss": 1.0}, 1)
    elsewhere = Guarded("tensorboard", Fake(fails=AssertionError()), thread=ThreadPoolExecutor(1))
    elsewhere.log({"loss": 1.0}, 1)
    with pytest.raises(AssertionError):
        elsewhere.finish()


_SET_BY_STARTING = (
    "MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "TRACKIO_DIR", "WANDB_DIR",
)  # fmt: skip


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate's word that this process is the main one, which its trackers ask for."""
    known = bool(PartialState._shared_state)
    PartialState(cpu=True)
    yield
    if not known:
        PartialState._reset_state()


def real_package(test: Any) -> Any:
    """A test of an installed tracker; what it warns of is for its own people to mend."""
    return pytest.mark.usefixtures("one_process")(pytest.mark.filterwarnings("ignore")(test))


def real(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run tracked twice by the real package: three steps, then from a checkpoint of step 2 two more."""
    try:
        refuse_missing((name,))
    except MachineError as error:
        pytest.skip(error.message)
    for variable in _SET_BY_STARTING:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, plan = made(tmp_path), plan_with(name)
    for numbers in ((1, 2, 3), (3, 4)):
        tracked = start(plan, run, rank=0)
        for number in numbers:
            tracked.log(step(number, memory_bytes=GIB))
        tracked.log(Event(kind="eval", step=numbers[-1], held_out_loss=float(numbers[-1])))
        assert tracked.finish() == ""
        (run.checkpoint(2)).mkdir(parents=True, exist_ok=True)
        (run.checkpoint(2) / "DONE").touch()
    return run


def test_every_tracker_has_a_package_a_maker_and_a_remedy() -> None:
    assert set(PACKAGES) == set(trackers._MAKERS) == set(trackers._REMEDIES)


@real_package
def test_tensorboard_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = real("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [point.step for point in found.Scalars("loss")] == [1, 2, 3, 4]
    assert [(point.step, point.value) for point in found.Scalars("held_out_loss")] == [(4, 4.0)]
    assert {point.value for point in found.Scalars("memory_peak_gib")} == {1.0}
    assert len(list((run.path / "tensorboard").rglob("hparams.yml"))) == 1


@real_package
def test_mlflow_goes_on_in_one_run_of_a_database_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = real("mlflow", tmp_path, monkeypatch)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert [point.step for point in client.get_metric_history(found.info.run_id, "loss")] == [1, 2, 3, 3, 4]
    assert found.data.params["optim.lr"] == "0.0002"


@real_package
def test_wandb_offline_goes_on_under_one_id_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = real("wandb", tmp_path, monkeypatch)
    files = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({path.stem for path in files}) == 1
    assert all(b"held_out_loss" in path.read_bytes() for path in files)


@real_package
def test_trackio_goes_on_in_one_run_of_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = real("trackio", tmp_path, monkeypatch)
    with sqlite3.connect(run.path / "trackio/qdist.db") as database:
        rows = list(database.execute("select run_name, step from metrics order by id"))
    assert [number for _, number in rows] == [1, 2, 3, 3, 3, 4, 4]
    assert len({name for name, _ in rows}) == 1


def test_an_mlflow_store_that_does_not_know_the_run_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in _SET_BY_STARTING:
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(trackers, "_mlflow_knows", lambda run_id: False)
    tracker, known_as = trackers._mlflow(made(tmp_path), "an-id")
    assert (tracker.run_id, known_as, tracker.logging_dir, tracker.run_name) == (None, "", None, "run")
