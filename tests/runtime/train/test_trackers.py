"""Do trackers get the numbers of a run, once each, and go on where it goes on?"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from accelerate import PartialState

from qdist.core.errors import MachineError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event, encode
from qdist.core.text import GIB
from qdist.host.launch.trackers import PACKAGES, REMEDIES, Tracking, refuse_missing, send_rest, sent_to
from qdist.host.run.rundir import RunDir
from qdist.runtime.train import trackers
from qdist.runtime.train.trackers import Goal, follow, values_of
from tests.plans import CPU, planned


class Fake:
    """A tracker that keeps what it is given, and fails when told to."""

    def __init__(self) -> None:
        self.fails_at, self.finished = 0, False
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] | None = None

    def start(self) -> None:
        """Nothing to do."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        assert step != self.fails_at
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True

    @property
    def steps(self) -> list[int]:
        return [number for number, _ in self.rows]


def plan_with(*names: str) -> Plan:
    return planned("smollm2-135m", CPU, {"trackers": names, "lora.targets": ("q_proj", "v_proj")})


def made(tmp_path: Path, *names: str) -> RunDir:
    """A run that was planned at second 100."""
    run = RunDir(tmp_path / "run")
    for folder in (run.events, run.logs, run.path / "trackers"):
        folder.mkdir(parents=True)
    (run.path / "plan.json").write_bytes(msgspec.json.encode(plan_with(*names)))
    os.utime(run.path / "plan.json", (100, 100))
    return run


def step(number: int, **more: Any) -> Event:
    return Event(kind="step", step=number, loss=2.0, learning_rate=1e-4, tokens=75, padding=25, seconds=0.5, **more)


def steps(*numbers: int) -> list[Event]:
    return [step(number) for number in numbers]


def begun(kind: Any, number: int = 0, *, time: float = 101.0) -> Event:
    return Event(kind=kind, step=number, time=time)


def write(run: RunDir, events: Sequence[Event]) -> None:
    for event in events:
        with open(run.event_file(event.rank), "ab") as file:
            file.write(encode(event))


def checkpoint(run: RunDir, number: int) -> None:
    run.checkpoint(number).mkdir(parents=True)
    (run.checkpoint(number) / "DONE").touch()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """W&B replaced: 'tracker' is what starts, 'goal' what it was made for."""
    found: dict[str, Any] = {"tracker": Fake()}

    def make(goal: Goal) -> tuple[Any, str]:
        found["goal"] = goal
        return found["tracker"], goal.known_as or "id-1"

    monkeypatch.setitem(trackers._MAKERS, "wandb", make)
    return found


def track(run: RunDir, fakes: dict[str, Any], *later: Sequence[Event], fails_at: int = 0) -> Fake:
    """What a tracker's process hands over: of what is there, and of what is written while it follows."""
    tracker = fakes["tracker"] = Fake()
    tracker.fails_at = fails_at
    more = iter(later)

    def ended() -> bool:
        events = next(more, None)
        write(run, events or ())
        return events is None

    follow(run, "wandb", ended=ended)
    return tracker


def test_a_step_has_loss_speed_padding_data_time_and_memory() -> None:
    event = step(3, gradient_norm=0.5, data_s=0.125, memory_bytes=2 * GIB)
    assert values_of(event, fullest_bytes=3 * GIB) == {
        "loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 0.5, "seconds": 0.5, "data_seconds": 0.125,
        "tokens_per_second": 150.0, "padding_share": 0.25, "memory_peak_gib": 2.0, "memory_peak_fullest_gib": 3.0,
    }  # fmt: skip


def test_an_evaluation_has_its_loss_and_other_events_nothing() -> None:
    event = Event(kind="eval", step=3, held_out_loss=1.5, memory_bytes=GIB)
    assert values_of(event) == {"held_out_loss": 1.5, "memory_peak_gib": 1.0, "memory_peak_fullest_gib": 1.0}
    assert values_of(Event(kind="eval", step=3, task="mmlu:a", figure=0.5)) == {"mmlu:a": 0.5}
    assert values_of(Event(kind="checkpoint", step=3, memory_bytes=GIB)) == {}


def test_a_step_of_no_time_has_no_speed() -> None:
    assert "tokens_per_second" not in values_of(Event(kind="step", step=1, tokens=5))


def test_a_run_is_followed_to_its_end_and_each_number_sent_once(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run = made(tmp_path)
    write(run, [begun("start"), *steps(1, 2)])
    assert track(run, fakes, steps(3), [], steps(4, 5)).steps == [1, 2, 3, 4, 5]
    assert fakes["tracker"].finished
    assert track(run, fakes).steps == []
    assert (sent_to(run, "wandb").step, sent_to(run, "wandb").events) == (5, 6)


def test_the_fullest_rank_is_known_from_the_last_word_of_each(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run = made(tmp_path)
    write(run, [begun("start"), step(1, memory_bytes=2 * GIB, time=102.0), step(1, rank=1, memory_bytes=3 * GIB)])
    later = [step(2, memory_bytes=2 * GIB, time=104.0), step(2, rank=1, memory_bytes=GIB, time=103.0)]
    tracker = track(run, fakes, later)
    assert [row["memory_peak_fullest_gib"] for _, row in tracker.rows] == [3.0, 2.0]


def test_the_settings_are_kept_once_and_a_resumed_run_goes_on(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run = made(tmp_path, "wandb")
    settings = track(run, fakes).settings
    assert fakes["goal"].known_as == ""
    assert settings is not None
    assert (settings["optim.lr"], settings["lora.targets"]) == (2e-4, "q_proj,v_proj")
    assert {type(value) for value in settings.values()} <= {int, float, str, bool}
    assert track(run, fakes).settings is None
    assert fakes["goal"].known_as == "id-1"


@pytest.mark.parametrize(
    ("log", "checkpoints", "sent"),
    [
        # Started before the ranks of a resumed run have said that they are: steps behind the checkpoint come again.
        ([begun("start", time=50.0), *steps(1, 2, 3, 4)], [2], [1, 2]),
        ([begun("start", time=50.0), *steps(1, 2, 3, 4)], [], []),
        # They have said so, or it is the first launch.
        ([begun("start", time=50.0), *steps(1, 2, 3, 4), begun("resume", 2), *steps(3)], [2], [1, 2, 3]),
        ([begun("start"), *steps(1, 2, 3, 4)], [2], [1, 2, 3, 4]),
    ],
)
def test_steps_that_are_taken_back_are_not_sent(
    tmp_path: Path, fakes: dict[str, Any], log: list[Event], checkpoints: list[int], sent: list[int]
) -> None:
    run = made(tmp_path)
    for number in checkpoints:
        checkpoint(run, number)
    write(run, log)
    assert track(run, fakes).steps == sent


def test_a_resumed_run_tells_its_tracker_which_steps_come_again(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run = made(tmp_path)
    write(run, [begun("start", time=50.0), *steps(1, 2, 3)])
    checkpoint(run, 3)
    track(run, fakes)
    write(run, [begun("resume", 2), *steps(3, 4)])
    assert track(run, fakes).steps == [3, 4]
    assert fakes["goal"].redone == 3
    write(run, steps(5))
    track(run, fakes)
    assert fakes["goal"].redone is None


def test_a_tracker_that_fails_goes_on_behind_what_it_has(tmp_path: Path, fakes: dict[str, Any]) -> None:
    run = made(tmp_path)
    write(run, [begun("start"), *steps(1, 2, 3, 4)])
    with pytest.raises(AssertionError):
        track(run, fakes, fails_at=3)
    assert sent_to(run, "wandb").step == 2
    assert track(run, fakes).steps == [3, 4]


def test_a_store_that_does_not_know_the_run_is_given_all_of_it(
    tmp_path: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path)
    write(run, [begun("start"), *steps(1, 2)])
    track(run, fakes)
    monkeypatch.setitem(trackers._MAKERS, "wandb", lambda goal: (fakes["tracker"], "id-2"))
    write(run, steps(3))
    assert track(run, fakes).steps == [1, 2, 3]
    assert fakes["tracker"].settings is not None
    assert sent_to(run, "wandb").known_as == "id-2"


_SET_BY_STARTING = ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_DIR")


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
    run = made(tmp_path, name)
    for start, numbers in ((begun("start"), (1, 2, 3)), (begun("resume", 2), (3, 4))):
        write(run, [start, *(step(number, memory_bytes=GIB) for number in numbers)])
        write(run, [Event(kind="eval", step=numbers[-1], held_out_loss=float(numbers[-1]), memory_bytes=GIB)])
        follow(run, name, ended=lambda: True)
    return run


def test_every_tracker_has_a_package_a_maker_and_a_remedy() -> None:
    assert set(PACKAGES) == set(trackers._MAKERS) == set(REMEDIES)


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
    tracker, known_as = trackers._mlflow(Goal(made(tmp_path), "an-id"))
    assert (tracker.run_id, known_as, tracker.logging_dir, tracker.run_name) == (None, "", None, "run")


@pytest.mark.slow
def test_a_process_follows_a_run_and_sends_later_what_was_left(tmp_path: Path) -> None:
    run, said = made(tmp_path, "tensorboard"), list[str]()
    write(run, [begun("start"), *steps(1, 2)])
    with Tracking(run, ("tensorboard",), say=said.append) as tracking:
        tracking.look()
        write(run, steps(3))
    assert [line for line in said if line.startswith("warning")] == []
    assert sent_to(run, "tensorboard").step == 3
    write(run, steps(4))
    send_rest(run, say=said.append)
    assert said[-1] == "sending what is left to tensorboard"
    assert sent_to(run, "tensorboard").step == 4
    send_rest(run, say=said.append)
    assert said.count("sending what is left to tensorboard") == 1
