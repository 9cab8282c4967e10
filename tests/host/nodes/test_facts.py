"""What does a machine say of itself as a node?"""

import io
from pathlib import Path

import msgspec
import pytest

from qdist.core.nodes.facts import NodeFacts
from qdist.core.nodes.job import AgentLine, NodeJob
from qdist.host.nodes import facts
from qdist.host.nodes.facts import facts_here, run_id_of
from qdist.host.run.rundir import RunDir


def job(run: Path) -> NodeJob:
    return NodeJob(
        run=str(run), node=1, name="b", address="10.0.0.2", endpoints=("10.0.0.1:1",), least=1, most=2, token="", gpus=3
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))


def test_a_node_without_the_run_says_so_and_makes_nothing(tmp_path: Path) -> None:
    found = facts_here(job(tmp_path / "run"))
    assert (found.name, found.gpus, found.run_id, found.steps) == ("b", 3, "", ())
    assert {"python", "qdist", "torch", "code"} <= set(found.versions)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_id_and_one_without_has_that_of_its_first_event(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    of_plan = run_id_of(run)
    run.events.mkdir()
    run.event_file(0).write_text("first\nsecond\n")
    of_events = run_id_of(run)
    run.event_file(0).write_text("first\nanother\n")
    assert run_id_of(run) == of_events != of_plan
    (tmp_path / "run_id").write_text("named")
    assert run_id_of(run) == "named"


@pytest.mark.parametrize("is_file", [False, True])
def test_they_are_printed_as_json_and_so_is_an_error(
    is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_file:
        (tmp_path / "run").write_text("")
    stdin = io.TextIOWrapper(io.BytesIO(msgspec.json.encode(job(tmp_path / "run"))))
    monkeypatch.setattr("sys.stdin", stdin)
    facts.main()
    printed = capsys.readouterr().out.encode()
    if is_file:
        line = msgspec.json.decode(printed, type=AgentLine)
        assert (line.kind, line.text) == ("error", f"{tmp_path / 'run'} cannot be written: it is a file")
    else:
        assert msgspec.json.decode(printed, type=NodeFacts).node == 1
