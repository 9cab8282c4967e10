import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdist.core.machine.cluster import Cluster
from qdist.core.nodes.facts import NodeFacts, Verdict
from qdist.core.nodes.job import NodeJob
from qdist.core.planning.plan import Prepared
from qdist.core.telemetry.nodes import NodeEvent
from qdist.host.run.rundir import RESULT
from qdist.runtime.nodes import working
from qdist.runtime.nodes.agreeing import Agreed
from qdist.runtime.nodes.board import Board, Disrupted
from qdist.runtime.nodes.working import Work
from tests.runtime.nodes.stores import MemoryStore
from tests.runtime.tiny import plan_of, save_config

NAMES = ("ash", "birch", "cedar")
CPU = Cluster(device="cpu", gpus=(), cpu_count=1, memory_bytes=1, memory_free_bytes=1)


class Ranks:
    """Ranks that go on for ever."""

    ranks = (0,)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.made_way = False

    def failure(self) -> None:
        return None

    def ended(self) -> bool:
        return False

    def kill(self) -> None:
        """They are none."""

    def make_way(self) -> None:
        self.made_way = True


def agreed_of(run: Path, *, leads: bool = True, step: int | None = None, **settings: Any) -> Agreed:
    """Three nodes of a rank each, of which the first works."""
    facts = {
        each: NodeFacts(
            node=each, name=name, address=f"10.0.0.{each}", versions={}, clock=0.0, free_bytes=1, cache_free_bytes=1,
            cluster=CPU, gpus=1,
        )
        for each, name in enumerate(NAMES)
    }  # fmt: skip
    plan = plan_of(save_config(run.parent / "model"), run, **settings)
    return Agreed(
        plan, Verdict(generation=1, members=(0, 1, 2), step=step), facts, Prepared(source=plan.source, data=None),
        leads=leads, keeps=False,
    )  # fmt: skip


def work_of(
    run: Path, node: int, store: MemoryStore, silent: list[dict[int, float]], *, look: Callable[[], None] = lambda: None
) -> tuple[Work, list[NodeEvent]]:
    """One of three nodes, the first of which leads; another waits to be let in. silent: who is lost, look by look."""
    job = NodeJob(
        run=str(run), node=node, name=NAMES[node], address=f"10.0.0.{node}", endpoints=("10.0.0.0:1",), least=1, most=3,
        token="a token of tests",
    )  # fmt: skip
    agreed = agreed_of(run, leads=node == 0)
    meeting: Any = SimpleNamespace(
        serves=node == 0, port=1, files=None, generation=lambda: 1, ended=lambda: None,
        beats=SimpleNamespace(cut_off=False, silent=lambda: silent.pop(0)),
    )  # fmt: skip
    events: list[NodeEvent] = []
    teller: Any = SimpleNamespace(writes=True, event=events.append)
    rendezvous = SimpleNamespace(num_nodes_waiting=lambda: 1)
    run.mkdir(exist_ok=True)
    return Work(job, meeting, Board(store, look), agreed, rendezvous, teller, lambda: 0, lambda: False), events


@pytest.mark.parametrize(
    ("step", "start", "more"),
    [(None, "ash begins, 1 rank", "; global_batch=6 would be"), (7, "ash goes on from step 7, 1 rank", "")],
)
def test_nodes_that_stand_by_are_named_with_the_batch_that_would_use_them(
    tmp_path: Path, step: int | None, start: str, more: str
) -> None:
    why = "birch and cedar stand by: the 4 samples of a step are not spread over more"
    agreed = agreed_of(tmp_path / "run", step=step, global_batch=4, micro_batch=2)
    assert working.describe_start(agreed) == f"{start}; {why}{more}"


def test_a_node_that_leaves_as_another_is_lost_is_no_newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "OwnRanks", Ranks)
    store = MemoryStore()
    follower, _ = work_of(tmp_path / "run", 1, store, [{2: 10.0}])
    with pytest.raises(Disrupted):
        follower.finish()
    leader, events = work_of(tmp_path / "run", 0, store, [{}, {}])
    with pytest.raises(Disrupted):
        leader.finish()
    assert [(event.kind, event.name, event.seconds) for event in events] == [("lost", "cedar", 10.0)]


def test_who_is_lost_after_the_last_step_leaves_the_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Ranks):
        def ended(self) -> bool:
            return True

    monkeypatch.setattr(working, "OwnRanks", Ended)
    store = MemoryStore()
    for node in (1, 2):
        Board(store, lambda: None).put(f"done/{node}", True)
    leader, _ = work_of(tmp_path / "run", 0, store, [{}, {2: 10.0}], look=_lost)
    (tmp_path / "run" / RESULT).write_text(json.dumps({"steps": 3}))
    assert leader.finish() == "finished"


def _lost() -> None:
    raise Disrupted
