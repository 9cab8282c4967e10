"""Does a node know its run's nodes from its own folder, whatever the clocks of the others say?"""

import os
import socket
import time
from pathlib import Path

import msgspec
import pytest

from qdist.core.telemetry.heartbeat import Heartbeat, encode
from qdist.core.telemetry.nodes import NodeEvent
from qdist.core.telemetry.snapshot import Reading
from qdist.host.files import locked
from qdist.host.run import observer
from qdist.host.run.listing import find, listed
from qdist.host.run.nodes import node_events
from qdist.host.run.observer import RunObserver
from qdist.host.run.presence import agent_is_here, lock_of
from qdist.host.run.rundir import NODES, Ended, RunDir
from qdist.host.run.state import note, state_of
from qdist.host.run.watchdog import PulseReader
from tests.core.telemetry.test_nodes import LOST, REGROWN, formed
from tests.plans import CPU, gpus, planned


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of three ranks."""
    run = RunDir(tmp_path / "r1")
    for folder in (run.events, run.logs, run.pulses):
        folder.mkdir(parents=True)
    (run.path / "plan.json").write_bytes(
        msgspec.json.encode(planned("smollm2-135m", CPU, {"gpus": 3, "global_batch": 12}))
    )
    os.utime(run.path / "plan.json", (time.time() - 600,) * 2)
    return run


def write(run: RunDir, *events: NodeEvent, torn: bytes = b"") -> None:
    with open(run.path / NODES, "ab") as file:
        file.write(b"".join(msgspec.json.encode(event) + b"\n" for event in events) + torn)


def beat(run: RunDir, *, time_there: float, host: str = "far", moved: float = 0.0, heard: float | None = None) -> None:
    """A heartbeat of rank 0. heard: when its file was written, by the clock here."""
    pulse = Heartbeat(rank=0, pid=1, host=host, time=time_there, moved=moved or time_there, phase="training", step=3)
    run.pulse_file(0).write_bytes(encode(pulse))
    if heard is not None:
        os.utime(run.pulse_file(0), (heard, heard))


def test_a_run_of_one_machine_has_no_events_of_nodes(run: RunDir) -> None:
    assert node_events(run) == []
    assert RunObserver(run).snapshot().nodes is None


def test_a_run_of_several_machines_is_resumed_with_the_flags_that_name_them(run: RunDir) -> None:
    write(run, formed("ab"))
    note(run, Ended(state="stopped", time=20.0))
    advice = f"qdist launch --resume --run {run.path}, with --hosts or --nnodes as it was launched"
    assert RunObserver(run).snapshot().try_ == advice


def test_a_torn_last_line_is_left_out_and_so_is_one_that_is_no_event(run: RunDir) -> None:
    write(run, *REGROWN[:2], torn=b'\xff{}\n{"kind":"dreamt","time":1}\n{"kind":"lost","time":20')
    assert node_events(run) == list(REGROWN[:2])
    write(run, torn=b'0.0,"generation":1,"name":"c"}\n')
    assert [event.name for event in node_events(run)] == ["", "b", "c"]


def test_the_first_line_of_an_agent_after_one_that_was_killed_in_a_line_is_read(run: RunDir) -> None:
    write(run, REGROWN[0], torn=b'{"kind":"lost","time":20')
    write(run, REGROWN[2])
    assert node_events(run) == [REGROWN[0], REGROWN[2]]


def test_a_run_is_running_where_the_agent_of_a_node_takes_part(run: RunDir) -> None:
    run.event_file(0).touch()
    assert (agent_is_here(run), state_of(run)) == (False, "killed")
    with locked(lock_of(run, 1), busy=""):
        assert (agent_is_here(run), state_of(run)) == (True, "running")
    assert (agent_is_here(run), state_of(run)) == (False, "killed")


def test_a_folder_with_no_more_than_an_agents_lock_is_bare(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    lock_of(run, 1).touch()
    assert run.is_bare()


@pytest.mark.parametrize("skew", [-3600.0, -5.0, 5.0, 3600.0])
def test_a_rank_elsewhere_is_heard_when_its_beat_changes_here(run: RunDir, skew: float) -> None:
    reader = PulseReader(run)
    beat(run, time_there=1000 + skew, moved=990 + skew, heard=1000.0)
    first = reader.read(1001.0)[0]
    assert (first.time, first.moved) == (1000.0, 990.0)
    assert reader.read(1009.0)[0].time == 1000.0
    beat(run, time_there=1010 + skew, heard=1.0)
    assert reader.read(1011.0)[0].time == 1011.0


def test_a_file_that_was_written_in_the_future_was_written_now(run: RunDir) -> None:
    beat(run, time_there=1000.0, heard=1500.0)
    assert PulseReader(run).read(1001.0)[0].time == 1001.0


def test_a_rank_here_is_judged_by_its_own_word(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "far")
    beat(run, time_there=900.0, heard=1000.0)
    assert PulseReader(run).read(1001.0)[0].time == 900.0


@pytest.mark.parametrize("skew", [-60.0, 60.0])
def test_clocks_that_differ_make_no_rank_silent(run: RunDir, skew: float) -> None:
    beat(run, time_there=time.time() + skew)
    with locked(lock_of(run, 1), busy=""):
        assert RunObserver(run).snapshot().troubles == ()
        beat(run, time_there=time.time() + skew, heard=time.time() - 15)
        (trouble,) = RunObserver(run).snapshot().troubles
    assert trouble.startswith("rank 0 has been silent for 15 s: it was on far")


def test_the_gpus_of_each_node_are_counted_from_its_first(run: RunDir) -> None:
    nodes = [{"name": "a", "gpus": 2}, {"name": "b", "gpus": 1}]
    cards = [{"index": index, "name": "H200", "total_bytes": 9, "free_bytes": 9} for index in (0, 1, 0)]
    machine = {"device": "cuda", "gpus": cards, "cpu_count": 1, "memory_bytes": 9, "memory_free_bytes": 9}
    (run.path / "machine.json").write_bytes(msgspec.json.encode({**machine, "nodes": nodes}))
    assert RunObserver(run).snapshot().first_cards == (0, 2)


def test_logs_of_all_ranks_come_together_those_first_that_were_written_last(run: RunDir) -> None:
    for rank, written in ((0, 50), (2, 70)):
        run.log_file(rank).write_text("one\ntwo\nthree\n")
        os.utime(run.log_file(rank), (written, written))
    snapshot = RunObserver(run).snapshot(all_logs=True, log_lines=2)
    assert list(snapshot.logs.items()) == [(2, ("two", "three")), (0, ("two", "three"))]


def test_a_run_that_is_about_to_grow_is_not_stopping(run: RunDir) -> None:
    write(run, *REGROWN[:3])
    (run.path / "stop").touch()
    with locked(lock_of(run, 1), busy=""):
        assert RunObserver(run).snapshot().stopping
        write(run, REGROWN[3])
        assert not RunObserver(run).snapshot().stopping


def test_a_monitor_sees_what_happens_to_nodes_while_it_watches(run: RunDir) -> None:
    look = RunObserver(run)
    seen = []
    for event in REGROWN[:3]:
        write(run, event)
        nodes = look.snapshot().nodes
        seen.append(nodes and (len(nodes.generations), len(nodes.missing)))
    assert seen == [(1, 0), (1, 1), (2, 1)]


def test_a_node_that_takes_no_part_any_more_does_not_speak_for_the_others(run: RunDir) -> None:
    run.event_file(0).touch()
    write(run, *REGROWN)
    snapshot = RunObserver(run).snapshot()
    assert (snapshot.state, snapshot.message, snapshot.try_) == (
        "killed",
        "no agent works here any more; its nodes were a, b, c",
        f"qdist monitor {run.path} on one of them",
    )
    write(run, NodeEvent(kind="failed", time=900.0, generation=3))
    assert RunObserver(run).snapshot().message == "its launcher recorded no reason"


def test_ranks_of_a_lost_node_are_not_named_one_by_one(run: RunDir) -> None:
    write(run, formed("bac"))
    beat(run, time_there=5.0, heard=time.time() - 15)
    with locked(lock_of(run, 1), busy=""):
        assert len(RunObserver(run).snapshot().troubles) == 1
        write(run, LOST)
        assert RunObserver(run).snapshot().troubles == ()


def test_two_nodes_on_one_machine_have_each_their_own_gpus(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cards:
        def __init__(self, environment: dict[str, str]) -> None:
            self._name = f"GPU {environment['CUDA_VISIBLE_DEVICES']}"

        def read(self) -> tuple[Reading]:
            return (Reading(self._name, 1, 9),)

    monkeypatch.setattr(observer, "Readings", Cards)
    monkeypatch.setattr(observer, "environment_of", lambda pulse: {"CUDA_VISIBLE_DEVICES": str(5 + pulse.rank)})
    plan = planned("smollm2-135m", gpus(2, 80), {"gpus": 2})
    ranks = tuple(msgspec.structs.replace(rank, node=rank.rank, gpus=(0,)) for rank in plan.ranks)
    (run.path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, ranks=ranks)))
    os.utime(run.path / "plan.json", (1, 1))
    for rank in (0, 1):
        pulse = Heartbeat(rank=rank, pid=os.getpid(), host=socket.gethostname(), time=time.time())
        run.pulse_file(rank).write_bytes(encode(pulse))
    with locked(lock_of(run, 1), busy=""):
        cards = RunObserver(run).snapshot().cards
    assert {rank: own[0].name for rank, own in cards.items()} == {0: "GPU 5", 1: "GPU 6"}


def test_a_list_of_runs_names_nodes_and_who_is_missing(run: RunDir) -> None:
    write(run, formed("abc"), msgspec.structs.replace(LOST, time=time.time(), seconds=15.0))
    with locked(lock_of(run, 1), busy=""):
        (row,) = listed(find([run.path]))
    assert (row.nodes, row.why) == (("a", "b", "c"), "b has not been heard of for 15 s")
    (row,) = listed(find([run.path]))
    assert row.why == ""


def test_a_list_says_nothing_of_nodes_for_one_machine(run: RunDir) -> None:
    assert b'"nodes"' not in msgspec.json.encode(listed(find([run.path])))
