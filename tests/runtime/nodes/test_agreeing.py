from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from qdist.core.errors import RunError
from qdist.core.machine.cluster import Cluster
from qdist.core.nodes.facts import NodeFacts, Verdict
from qdist.core.nodes.job import NodeJob
from qdist.core.spec.run_spec import RunSpec
from qdist.host.run.rundir import RunDir
from qdist.runtime.nodes import agreeing
from qdist.runtime.nodes.agreeing import Agreement, Memory, judged
from qdist.runtime.nodes.board import Board, CutOff
from tests.runtime.nodes.stores import MemoryStore

HERE = Cluster(device="cpu", gpus=(), cpu_count=2, memory_bytes=8 << 30, memory_free_bytes=8 << 30)


def facts(node: int, **more: Any) -> NodeFacts:
    usual: dict[str, Any] = {
        "node": node, "name": "abc"[node], "address": f"10.0.0.{node + 1}", "versions": {"python": "3.11.2"},
        "clock": 0.0, "free_bytes": 1 << 40, "cache_free_bytes": 1 << 40, "cluster": HERE, "gpus": 1,
    }  # fmt: skip
    return NodeFacts(**{**usual, **more})


def verdict(run: Path, there: list[NodeFacts], *, leader: int = 0, least: int = 1, resume: bool = False) -> Any:
    job = NodeJob(
        run=str(run), node=leader, name="abc"[leader], address="10.0.0.1", endpoints=("10.0.0.1:29400",),
        least=least, most=3, token="0" * 16, settings={"model": "llama-7b", "steps": 3}, resume=resume,
    )  # fmt: skip
    return judged({each.node: each for each in there}, leader, job, RunDir(run))


def test_a_new_run_begins_with_its_leader_first_and_the_settings_of_its_leader(tmp_path: Path) -> None:
    found = verdict(tmp_path / "run", [facts(0), facts(1), facts(2)], leader=1)
    assert (found.members, found.generation, found.step, found.source) == ((1, 0, 2), 1, None, None)
    assert msgspec.json.decode(found.spec, type=RunSpec).run == str(tmp_path / "run")
    assert found.run_id


def test_those_who_are_left_go_on_from_the_newest_checkpoint_that_one_of_them_has(tmp_path: Path) -> None:
    before: dict[str, Any] = {"generation": 4, "members": (0, 1, 2), "active": True, "run_id": "x"}
    found = verdict(tmp_path, [facts(1, steps=(40, 45), **before), facts(2, steps=(40, 50), **before)], leader=1)
    assert (found.members, found.generation, found.step, found.source) == ((1, 2), 5, 50, 2)
    assert not found.spec
    assert not found.wait


def test_a_checkpoint_on_a_shared_disk_is_brought_by_nobody(tmp_path: Path) -> None:
    before: dict[str, Any] = {"generation": 1, "members": (0, 1), "active": True, "run_id": "x", "sees_shared": True}
    found = verdict(tmp_path, [facts(0, steps=(5,), **before), facts(1, steps=(5, 10), **before)])
    assert (found.step, found.source) == (10, None)


def test_a_minority_waits_and_the_returning_node_with_an_empty_disk_does_not_lead_it_astray(tmp_path: Path) -> None:
    before: dict[str, Any] = {"generation": 2, "members": (0, 1, 2), "active": True, "run_id": "x", "steps": (5,)}
    alone = verdict(tmp_path, [facts(2, **before)], leader=2)
    assert alone.wait.startswith("1 of the 3 nodes")
    with_new_one = verdict(tmp_path, [facts(0), facts(2, **before)], leader=2)
    assert (with_new_one.wait, with_new_one.step, with_new_one.members) == ("", 5, (2, 0))


def test_fewer_than_the_run_needs_wait(tmp_path: Path) -> None:
    assert verdict(tmp_path, [facts(0)], least=2).wait == "1 node of 2 that the run needs is there"


@pytest.mark.parametrize(
    ("there", "resume", "words"),
    [
        ([facts(0), facts(1, run_id="x")], False, "b"),
        ([facts(0), facts(1)], True, "no node has a run"),
        ([facts(0, run_id="x"), facts(1, run_id="y")], True, "another run"),
        ([facts(0), facts(1, versions={"python": "3.12.1"})], False, "b has Python 3.12"),
    ],
)
def test_what_does_not_agree_is_refused_with_the_name_of_a_node(
    tmp_path: Path, there: list[NodeFacts], resume: bool, words: str
) -> None:
    found = verdict(tmp_path, there, resume=resume)
    assert words in found.refuse
    assert found.try_


def test_a_run_that_is_asked_to_go_on_goes_on_after_all_agents_were_started_anew(tmp_path: Path) -> None:
    found = verdict(tmp_path, [facts(0, run_id="x", steps=(7,)), facts(1, run_id="x", steps=(7,))], resume=True)
    assert (found.step, found.run_id, found.refuse) == (7, "x", "")


@pytest.mark.parametrize(("hello", "raised"), [(None, RunError), (RunError("nothing listens there"), CutOff)])
def test_a_leader_that_is_gone_while_it_gives_the_run_is_no_failure_of_the_run(
    tmp_path: Path, hello: Exception | None, raised: type[Exception]
) -> None:
    store = MemoryStore()
    board = Board(store, lambda: None)
    board.put("plan", "{}")
    meeting: Any = SimpleNamespace(serves=False, files=Leader(hello))
    job = NodeJob(
        run=str(tmp_path), node=1, name="b", address="10.0.0.2", endpoints=("10.0.0.1:1",), least=1, most=2,
        token="0" * 16,
    )  # fmt: skip
    agreement = Agreement(job, meeting, board, Memory(), place=1, size=2)
    verdict = Verdict(generation=1, members=(0, 1), run_id="x", step=5)
    with pytest.raises(raised):
        agreement._brought_run(verdict, {0: facts(0), 1: facts(1)})


class Leader:
    """Files of a leader whose connection breaks. hello: what comes of asking it again."""

    def __init__(self, hello: Exception | None) -> None:
        self._hello = hello

    def list(self, below: str) -> dict[str, int]:
        raise RunError("the connection broke")

    def hello(self) -> tuple[str, str]:
        if self._hello:
            raise self._hello
        return "", ""


def second(run: Path) -> NodeJob:
    """The job of a node that comes to the first one."""
    return NodeJob(
        run=str(run),
        node=1,
        name="b",
        address="10.0.0.2",
        endpoints=("10.0.0.1:1",),
        least=1,
        most=2,
        token="0" * 16,
    )


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"versions": {"python": "3.12.1"}}, "b has Python 3.12"),
        ({"run_id": "another"}, "another run"),
        ({"run_id": "x"}, ""),
        ({}, ""),
    ],
)
def test_a_newcomer_that_does_not_fit_a_run_at_work_ends_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(agreeing, "facts_here", lambda job: facts(1, **here))
    at_work: Any = SimpleNamespace(serves=False, facts=lambda: facts(0, run_id="x"))
    job = second(tmp_path)
    if not words:
        agreeing.require_fit(job, at_work)
        return
    with pytest.raises(RunError, match=words):
        agreeing.require_fit(job, at_work)


def test_a_run_that_has_not_begun_is_joined_unseen(tmp_path: Path) -> None:
    job = second(tmp_path)
    not_yet: Any = SimpleNamespace(serves=False, facts=lambda: None)
    agreeing.require_fit(job, not_yet)
