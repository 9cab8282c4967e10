"""What an agent makes of the ends of its meetings and generations, which are given by hand."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdist.core.errors import RunError
from qdist.core.nodes.job import NodeJob
from qdist.core.telemetry.nodes import NodeEvent
from qdist.host.files import locked
from qdist.host.run.presence import lock_of
from qdist.host.run.rundir import PLAN, RESULT, RunDir
from qdist.runtime.nodes import agent as agents
from qdist.runtime.nodes.agent import FAILED, Agent
from qdist.runtime.nodes.agreeing import Memory, Waiting
from qdist.runtime.nodes.board import CutOff, Disrupted

Told = list[NodeEvent]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Agent, Told]:
    """An agent that has worked in generation 1 of a run, and what it tells."""
    monkeypatch.setattr(agents.signal, "signal", lambda *_: None)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / PLAN).write_text("{}")
    job = NodeJob(
        run=str(run.path), node=1, name="birch", address="10.0.0.2", endpoints=("10.0.0.1:1",), least=1, most=2,
        token="a token of tests",
    )  # fmt: skip
    own, told = Agent(job, io.BytesIO()), Told()
    monkeypatch.setattr(own, "_memory", Memory(generation=1, members=(0, 1), active=True))
    monkeypatch.setattr(own, "_teller", Teller(told))
    monkeypatch.setattr(agents, "rendezvous_of", lambda *_: None)
    return own, told


class Teller:
    def __init__(self, told: Told) -> None:
        self._told, self.writes, self.lines = told, True, []

    def event(self, event: NodeEvent) -> None:
        self._told.append(event)

    def line(self, line: Any) -> None:
        self.lines.append(line)

    say = line


def meeting(ends: list[Any]) -> Any:
    return SimpleNamespace(
        serves=False, server_name="ash", server_node=0, cut=lambda: None, end=ends.append,
        beats=SimpleNamespace(unreached_s=lambda: 10.0),
    )  # fmt: skip


def meets(monkeypatch: pytest.MonkeyPatch, generation: Callable[..., Any], own: Agent) -> list[Any]:
    """Have the agent meet others; how it says that the run has ended."""
    ends: list[Any] = []

    @contextmanager
    def meet(*_: Any, **__: Any) -> Iterator[Any]:
        yield meeting(ends)

    monkeypatch.setattr(agents, "meet", meet)
    monkeypatch.setattr(own, "_generation", generation)
    return ends


@pytest.mark.parametrize("lost", [Disrupted, CutOff])
def test_a_run_that_has_its_result_is_finished_whoever_is_lost_then(
    agent: tuple[Agent, Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: type[Exception]
) -> None:
    own, told = agent

    def ends_as_another_is_lost(*_: Any) -> None:
        (tmp_path / "run" / RESULT).write_text(json.dumps({"steps": 3}))
        raise lost

    meets(monkeypatch, ends_as_another_is_lost, own)
    assert own.work() == 0
    assert [event.kind for event in told] == ["finished"]


def test_a_disk_that_fails_ends_the_run_with_the_name_of_its_node(
    agent: tuple[Agent, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = agent

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    ends = meets(monkeypatch, fails, own)
    assert own.work() == FAILED
    assert [end.message.split(":")[0] for end in ends] == ["birch"]
    assert [event.kind for event in told] == ["failed"]


def test_those_who_are_left_wait_from_the_end_of_their_work_on(
    agent: tuple[Agent, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = agent
    outcomes = iter(["again", Waiting("too few"), "finished"])
    since: list[float] = []

    def generation(*_: Any) -> str:
        found = next(outcomes)
        if isinstance(found, Waiting):
            raise found
        return str(found)

    monkeypatch.setattr(own, "_wait", lambda meeting, rendezvous, reason, began: since.append(began))
    ticks = iter(range(100, 200))
    monkeypatch.setattr(agents.time, "monotonic", lambda: float(next(ticks)))
    meets(monkeypatch, generation, own)
    assert own.work() == 0
    assert since == [101.0]


def test_a_node_that_is_not_let_in_notes_no_end_of_a_run_that_others_work_on(
    agent: tuple[Agent, Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, told = agent

    def refused(*_: Any, **__: Any) -> None:
        raise RunError("the clock of birch is 1 h ahead of that of ash")

    monkeypatch.setattr(agents, "meet", refused)
    monkeypatch.setattr(own, "_memory", Memory())
    with locked(lock_of(RunDir(tmp_path / "run"), 0)):
        assert own.work() == FAILED
    assert not told


def test_a_run_directory_that_cannot_be_is_an_error_and_no_traceback(
    agent: tuple[Agent, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = agent

    def refused(_: Path) -> None:
        raise RunError("/run cannot be written")

    monkeypatch.setattr(agents, "require_folder", refused)
    assert own.work() == FAILED
