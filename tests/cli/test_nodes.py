"""Do monitor, report, metrics and stop say what is so of a run on several nodes?"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.nodes import NodeEvent
from qdist.host.files import locked
from qdist.host.run.presence import lock_of
from qdist.host.run.rundir import NODES, RunDir
from tests.core.telemetry.test_nodes import LOST, REGROWN, formed
from tests.plans import CPU, planned


def run_of(folder: Path, *nodes: NodeEvent) -> RunDir:
    """A run of three ranks that did 45 steps, went on from 40 and did 46; with what happened to its nodes."""
    run = RunDir(folder / "r1")
    for inner in (run.events, run.logs, run.pulses):
        inner.mkdir(parents=True)
    plan = planned("smollm2-135m", CPU, {"gpus": 3, "global_batch": 12, "steps": 60})
    (run.path / "plan.json").write_bytes(msgspec.json.encode(plan))
    turns = [Event(kind="start", time=101.0), *map(step, range(1, 46)), Event(kind="resume", step=40, time=260.0)]
    run.event_file(0).write_bytes(b"".join(map(encode, [*turns, *map(step, range(41, 47))])))
    if nodes:
        (run.path / NODES).write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in nodes))
    return run


def step(number: int) -> Event:
    return Event(kind="step", step=number, total_steps=60, loss=2.0, tokens=64, seconds=2.0, time=102.0 + 2 * number)


def qdist(*words: object) -> Result:
    done = CliRunner().invoke(main, [*map(str, words)], env={"COLUMNS": "100", "LINES": "24"}, prog_name="qdist")
    assert done.exit_code == 0, done.output
    return done


def just_lost(*, generation: int = 1) -> NodeEvent:
    return msgspec.structs.replace(LOST, time=time.time(), seconds=12.0, generation=generation)


def test_the_monitor_groups_ranks_by_node_and_names_one_that_is_lost(tmp_path: Path) -> None:
    run = run_of(tmp_path, formed("abc"), just_lost())
    with locked(lock_of(run, 1), busy=""):
        lines = qdist("monitor", run.path, "--once").output.splitlines()
    assert "3 CPU ranks on 3 nodes" in lines[0]
    head = next(index for index, line in enumerate(lines) if line.split()[:2] == ["node", "rank"])
    assert [line.split()[:2] for line in lines[head + 1 : head + 4]] == [["a", "0"], ["b", "1"], ["c", "2"]]
    assert any(line.startswith("! b has not been heard of for 1") for line in lines)


def test_two_ranks_of_a_node_have_its_name_once(tmp_path: Path) -> None:
    one, other, _ = REGROWN[0].members
    two = msgspec.structs.replace(one, ranks=(0, 1)), msgspec.structs.replace(other, ranks=(2,))
    run = run_of(tmp_path, msgspec.structs.replace(REGROWN[0], members=two))
    lines = qdist("monitor", run.path, "--once").output.splitlines()
    head = next(index for index, line in enumerate(lines) if line.split()[:2] == ["node", "rank"])
    assert [line[:10].split() for line in lines[head + 1 : head + 4]] == [["a", "0"], ["1"], ["b", "2"]]


def test_a_run_of_one_machine_is_shown_as_ever(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    found = json.loads(qdist("monitor", run.path, "--json").output)
    assert {"nodes", "generation", "waiting", "repeated_s"} & found.keys() == set()
    assert "node" not in found["ranks"][0]
    assert "node" not in qdist("monitor", run.path, "--once").output
    assert "node" not in qdist("metrics", run.path).output.replace("node_exporter", "")
    qdist("report", run.path)
    assert 'id="nodes"' not in (run.path / "report.html").read_text()


def test_a_run_that_was_resumed_on_other_ranks_does_not_name_nodes_beside_them(tmp_path: Path) -> None:
    run = run_of(tmp_path, formed("ab"))
    assert "node" not in json.loads(qdist("monitor", run.path, "--json").output)["ranks"][0]


def test_json_has_nodes_by_name_and_what_they_cost(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN, just_lost())
    found = json.loads(qdist("monitor", run.path, "--json").output)
    assert {name: (node["state"], node["ranks"]) for name, node in found["nodes"].items()} == {
        "a": ("member", [0]), "b": ("member", [1]), "c": ("member", [2]),
    }  # fmt: skip
    assert (found["generation"], found["repeated_s"], found["paused_s"]) == (3, 10.0, 82.0)
    assert [one["nodes"] for one in found["generations"]] == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]
    assert [row["node"] for row in found["ranks"]] == ["a", "b", "c"]


def test_a_node_that_left_its_generation_is_in_the_json_as_lost(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN[:3])
    nodes = json.loads(qdist("monitor", run.path, "--json").output)["nodes"]
    assert {name: node["state"] for name, node in nodes.items()} == {"a": "member", "c": "member", "b": "lost"}


def test_the_report_has_generations_and_what_they_cost(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN)
    qdist("report", run.path)
    page = (run.path / "report.html").read_text()
    said = "3 generations; b lost at step 45, back at step 120; 10 s of work done twice; 1 min 22 s until ranks"
    assert f"{said} were started again." in page
    assert '<section id="nodes"><h2>Nodes</h2>' in page
    assert "<td>after 2 min 10 s</td><td>40</td><td>a (rank 0), c (rank 1)</td>" in page
    assert "<dt>Nodes</dt><dd>a, b, c</dd>" in page


def test_metrics_of_ranks_have_a_node_and_there_are_some_of_nodes(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN, just_lost(generation=3))
    lines = qdist("metrics", run.path).output.splitlines()
    at = f'{{run="{run.path}"'
    for line in (
        f'qdist_node_up{at},node="a"}} 1.0', f'qdist_node_up{at},node="b"}} 0.0', f"qdist_generation{at}}} 3",
        f"qdist_nodes_lost_total{at}}} 2", f"qdist_repeated_seconds_total{at}}} 10.0",
        f'qdist_rank_step{at},rank="0",node="a"}} 46',
    ):  # fmt: skip
        assert line in lines


@pytest.mark.parametrize("flag", ["--logs", "--rank=1"])
def test_logs_of_all_ranks_are_seen_together_or_one_alone(tmp_path: Path, flag: str) -> None:
    run = run_of(tmp_path, formed("abc"))
    for rank in (0, 1):
        run.log_file(rank).write_text("".join(f"line {number} of {rank}\x1b[2J\n" for number in range(40)))
    lines = qdist("monitor", run.path, "--once", flag).output.splitlines()
    own = [line for line in lines if "line 39 of" in line]
    both = [f"{name} rank {rank}  line 39 of {rank}" for rank, name in enumerate("ab")]
    assert own == (both if flag == "--logs" else ["line 39 of 1"])
    assert any("of 2 of 3 ranks" in line for line in lines) == (flag == "--logs")


def test_logs_of_all_and_of_one_exclude_each_other(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for words, said in ((("--logs", "--rank", "1"), "--logs shows all ranks"), (("--json", "--logs"), "leave --logs")):
        done = CliRunner().invoke(main, ["monitor", str(run.path), *words])
        assert (done.exit_code, said in done.output) == (2, True)


AGENT = """
import sys, time
from pathlib import Path
from qdist.host.files import locked
run = Path(sys.argv[1])
with locked(run / "agent001.lock", busy="x"):
    print("here", flush=True)
    while not (run / "stop").exists():
        time.sleep(0.02)
"""


def test_a_run_is_stopped_from_any_node_that_takes_part(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN)
    command = [sys.executable, "-c", AGENT, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "here\n"
        said = qdist("stop", run.path).output.splitlines()
    assert said == [
        f"{run.path} saves a checkpoint after this step and ends on a, b, c",
        "stopped; there is no checkpoint yet",
        f"  go on: qdist launch --resume --run {run.path}, with --hosts or --nnodes as it was launched",
    ]
    assert run.stop_requested()


def test_a_node_that_takes_no_part_says_where_to_stop_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, *REGROWN)
    done = CliRunner().invoke(main, ["stop", os.fspath(run.path)])
    assert done.exit_code == 2
    assert done.output == (
        f"error: {run.path} is not running here; its nodes were a, b, c\n  try: qdist stop {run.path} on one of them\n"
    )
    assert not run.stop_requested()
