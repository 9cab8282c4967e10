"""Is the text what Prometheus reads, and are the figures those of the run?"""

import math
import re

import pytest

from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event, State
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodeEvent, NodeMember, fold_nodes
from qdist.core.telemetry.prometheus import exposition
from tests.plans import CPU, planned

PLAN = planned("smollm2-135m", CPU, {"gpus": 2})
HELP = re.compile(r"# HELP ([a-z_]+) \S.*\.")
TYPE = re.compile(r"# TYPE ([a-z_]+) (gauge|counter)")
LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\[\\n"])*)"')
SAMPLE = re.compile(rf"([a-z_]+)\{{({LABEL.pattern}(?:,{LABEL.pattern})*)\}} (\S+)")


def fold_of(*events: Event) -> RunHistory:
    fold = RunHistory(total_steps=PLAN.steps)
    fold.add(events)
    return fold


def step(number: int, *, loss: float | None = 2.0, rank: int = 0, memory_bytes: int = 10) -> Event:
    return Event(
        kind="step", step=number, rank=rank, loss=loss, learning_rate=1e-4, tokens=90, padding=10, seconds=0.5,
        own_tokens=45, busy_s=0.25, memory_bytes=memory_bytes, time=float(number),
    )  # fmt: skip


def text(
    fold: RunHistory | None = None, *, run: str = "r", plan: Plan = PLAN, state: State = "running", **pulses: Heartbeat
) -> str:
    return exposition(run, plan, fold or RunHistory(), {pulse.rank: pulse for pulse in pulses.values()}, state)


def parsed(exposed: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, by name and labels; checks the grammar, that HELP and TYPE come first, and that names are whole."""
    assert exposed.endswith("\n")
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    name, seen = "", set()
    lines = iter(exposed.splitlines())
    for line in lines:
        if line.startswith("#"):
            said, kind = HELP.fullmatch(line), TYPE.fullmatch(next(lines))
            assert said, line
            assert kind, line
            name = said[1]
            assert kind[1] == name
            assert (kind[2] == "counter") == name.endswith("_total")
            assert name not in seen
            seen.add(name)
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == name
        key = name, frozenset((found[1], found[2]) for found in LABEL.finditer(sample[2]))
        assert key not in samples
        samples[key] = float(sample[sample.lastindex or 0].replace("Inf", "inf"))
    return samples


def value(exposed: str, name: str, **labels: str) -> float | None:
    return parsed(exposed).get((name, frozenset({"run": "r", **labels}.items())))


def test_a_planned_run_has_its_state_and_its_prediction_and_no_loss() -> None:
    exposed = text(state="planned")
    assert value(exposed, "qdist_run_state", state="planned") == 1
    assert value(exposed, "qdist_run_state", state="running") == 0
    assert value(exposed, "qdist_planned_steps") == 5
    expected = float(PLAN.ranks[1].expected[0].total)
    assert value(exposed, "qdist_rank_memory_predicted_bytes", rank="1") == expected
    assert value(exposed, "qdist_loss") is None
    assert "qdist_held_out_loss" not in exposed


def test_figures_are_the_folds_and_the_ranks_own() -> None:
    events = (
        Event(kind="start", time=0.5), step(1), step(1, rank=1, memory_bytes=30), step(2, loss=1.0),
        Event(kind="eval", step=2, held_out_loss=1.25, time=3.0), Event(kind="checkpoint", step=2, time=4.0),
        Event(kind="resume", step=1, time=9.0), step(2, loss=4.0),
    )  # fmt: skip
    exposed = text(fold_of(*events))
    figures = {
        "qdist_step": 2, "qdist_loss": 4.0, "qdist_smoothed_loss": 3.0, "qdist_learning_rate": 1e-4,
        "qdist_tokens": 180, "qdist_tokens_per_second": 180.0, "qdist_padding_ratio": 0.1, "qdist_resumes_total": 1,
        "qdist_positions_per_second": 200.0,
        "qdist_trained_seconds_total": 3.5, "qdist_seconds_left": 1.5, "qdist_skipped_steps": 0,
        "qdist_held_out_loss": None, "qdist_checkpoint_step": None,
    }  # fmt: skip
    assert {name: value(exposed, name) for name in figures} == figures
    assert value(exposed, "qdist_rank_memory_peak_bytes", rank="1") == 30
    assert value(exposed, "qdist_rank_tokens_per_second", rank="1") == 180.0
    assert value(exposed, "qdist_rank_step", rank="0") == 2


def test_beats_say_memory_time_and_phase() -> None:
    beat = Heartbeat(rank=1, pid=1, host="h", time=12.5, phase="saving", memory_bytes=7)
    exposed = text(beat=beat)
    assert value(exposed, "qdist_rank_memory_bytes", rank="1") == 7
    assert value(exposed, "qdist_rank_beat_timestamp_seconds", rank="1") == 12.5
    assert value(exposed, "qdist_rank_phase", rank="1", phase="saving") == 1
    assert value(exposed, "qdist_rank_phase", rank="1", phase="training") == 0


@pytest.mark.parametrize(("loss", "written"), [(math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf")])
def test_losses_that_are_no_numbers_are_written_as_prometheus_does(loss: float, written: str) -> None:
    exposed = text(fold_of(step(1, loss=loss)))
    assert f'qdist_loss{{run="r"}} {written}\n' in exposed
    found = value(exposed, "qdist_loss")
    assert found is not None
    assert math.isnan(found) if math.isnan(loss) else found == loss


def test_labels_are_escaped() -> None:
    exposed = text(run='a"b\\c\nd')
    assert 'qdist_step{run="a\\"b\\\\c\\nd"} 0\n' in exposed
    parsed(exposed)


def test_figures_of_ranks_have_their_node_and_those_of_the_run_have_none() -> None:
    members = tuple(NodeMember(node=node, name=name, address="", ranks=(node,)) for node, name in enumerate('a"'))
    nodes = fold_nodes([
        NodeEvent(kind="formed", time=1.0, generation=4, members=members),
        NodeEvent(kind="lost", time=9.0, generation=4, name='"', seconds=5.0),
    ])  # fmt: skip
    beats = {rank: Heartbeat(rank=rank, pid=1, host="h", time=12.5) for rank in (0, 1)}
    fold = fold_of(Event(kind="start", time=0.5), step(1), step(1, rank=1), Event(kind="start", time=9.0))
    exposed = exposition("r", PLAN, fold, beats, "running", nodes)
    figures = parsed(exposed)
    assert all(("node" in dict(labels)) == name.startswith(("qdist_rank", "qdist_node_up")) for name, labels in figures)
    assert value(exposed, "qdist_rank_step", rank="1", node='\\"') == 1
    assert value(exposed, "qdist_node_up", node="a") == 1
    assert value(exposed, "qdist_node_up", node='\\"') == 0
    assert value(exposed, "qdist_repeated_seconds_total") == 0.5
    without = {(name, labels - {("node", "a"), ("node", '\\"')}) for name, labels in figures}
    assert parsed(text(fold, **{f"of{rank}": beat for rank, beat in beats.items()})).keys() <= without


def test_prometheus_own_parser_reads_all_of_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    exposed = text(fold_of(Event(kind="start", time=0.5), step(1)), run='a"b\\c\nd')
    families = list(parser.text_string_to_metric_families(exposed))
    assert sum(len(family.samples) for family in families) == len(parsed(exposed))
    assert {sample.labels["run"] for family in families for sample in family.samples} == {'a"b\\c\nd'}
