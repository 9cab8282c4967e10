"""Does the screen of a run fit any terminal, and say what it should?"""

import io
import itertools
import math
import socket
from typing import Any

import pytest
from rich.console import Console

from qdist.cli.views.dashboard import PANES, Pane, dashboard
from qdist.cli.views.plot import plot
from qdist.core.telemetry.events import Event
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodeEvent, NodeMember, NodesNow, fold_nodes
from qdist.core.telemetry.snapshot import Reading, Snapshot
from qdist.core.text import GIB, MIB
from tests.plans import CPU, machine, planned

NOW = 1000.0


def run_of(ranks: int, *, steps: int = 12, **fields: Any) -> Snapshot:
    fold = RunHistory()
    told = [Event(kind="eval", step=0, total_steps=60, held_out_loss=2.3)]
    for number in range(1, steps + 1):
        told += [
            Event(
                kind="step", step=number, total_steps=60, loss=3 - number / 10, learning_rate=2e-4 * number,
                gradient_norm=0.53, tokens=4096, own_tokens=2048, busy_s=3.5, seconds=4.0, rank=rank,
                memory_bytes=GIB + rank * 20 * MIB,
            )
            for rank in range(ranks)
        ]  # fmt: skip
    later = [Event(kind="eval", step=steps, held_out_loss=1.4), Event(kind="checkpoint", step=10, time=940.0)]
    fold.add([*told, *(later if steps else [])])
    device = fields.pop("device", machine(*[24] * ranks))
    plan = planned("smollm2-135m", device, {"gpus": ranks, "global_batch": 4 * ranks, "placement": "replicate"})
    pulses = {
        rank: Heartbeat(rank=rank, pid=1, host=socket.gethostname(), time=NOW - 2, phase="training", step=steps + 1,
                    memory_bytes=GIB)
        for rank in range(ranks)
    }  # fmt: skip
    fields = {"state": "running", "pulses": pulses, "card_bytes": (24 * GIB,) * ranks, **fields}
    return Snapshot(name="r1", plan=plan, fold=fold, now=NOW, **fields)


def drawn(snapshot: Snapshot, width: int = 80, height: int = 24, pane: Pane = "overview", *, encoding: str = "utf-8",
          **options: Any) -> str:  # fmt: skip
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(record=True, width=width, height=height, force_terminal=False, file=file)
    console.print(dashboard(snapshot, width, height, pane, **options))
    return console.export_text()


@pytest.mark.parametrize("pane", PANES)
@pytest.mark.parametrize("ranks", [1, 2, 9, 64])
@pytest.mark.parametrize("size", [(80, 24), (200, 50), (119, 30), (40, 10), (20, 5)])
def test_a_screen_fills_its_terminal_exactly(ranks: int, size: tuple[int, int], pane: Pane) -> None:
    lines = drawn(run_of(ranks, troubles=("rank 1 has been silent " * 9,)), *size, pane).splitlines()
    assert len(lines) == size[1]
    assert max(map(len, lines)) <= size[0]


@pytest.mark.parametrize("pane", PANES)
@pytest.mark.parametrize("nodes", [2, 3, 64])
@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10), (20, 5), (1, 1)])
def test_a_screen_of_several_nodes_fills_its_terminal_exactly(nodes: int, size: tuple[int, int], pane: Pane) -> None:
    names = [f"qdist-{node}.qdist.default.svc.cluster.local" for node in range(nodes)]
    logs = dict.fromkeys(range(nodes), ("one line\x1b[2J " * 30,) * 40)
    snapshot = run_of(nodes, nodes=nodes_named(names), logs=logs, all_logs=True)
    lines = drawn(snapshot, *size, pane).splitlines()
    assert len(lines) == size[1]
    assert max(map(len, lines)) <= size[0]


def nodes_named(names: list[str]) -> NodesNow:
    """A generation of these, a rank each, the last of which is lost."""
    members = tuple(
        NodeMember(node=node, name=name, address="10.0.0.1", ranks=(node,)) for node, name in enumerate(names)
    )
    seen = fold_nodes([
        NodeEvent(kind="formed", time=900.0, generation=1, members=members),
        NodeEvent(kind="lost", time=980.0, generation=1, name=names[-1], seconds=11.0),
    ])  # fmt: skip
    assert seen is not None
    return seen


def test_ranks_are_shown_by_node_and_those_of_a_lost_one_say_so() -> None:
    lines = drawn(run_of(2, nodes=nodes_named(["left", "right"])), 120, 24, "ranks").splitlines()
    assert "2 GPU ranks on 2 nodes" in lines[0]
    (left,) = [line for line in lines if line.lstrip().startswith("left ")]
    (right,) = [line for line in lines if line.lstrip().startswith("right ")]
    assert "in forward and backward passes of step 13" in left
    assert right.rstrip().endswith("its node is lost")
    assert any(line.startswith("! right has not been heard of for 31 s") for line in lines)


def test_logs_of_all_ranks_share_the_pane() -> None:
    logs = {1: ("a", "b", "c"), 0: ("d", "e", "f")}
    view = drawn(run_of(2, nodes=nodes_named(["left", "right"]), logs=logs, all_logs=True), 80, 14, "log")
    shown = [line.rstrip() for line in view.splitlines() if line.startswith(("left rank", "right rank"))]
    assert shown == ["left rank 0   e", "left rank 0   f", "right rank 1  b", "right rank 1  c"]


def test_the_overview_of_a_run_on_gpus_has_its_figures() -> None:
    card = Reading("H200", GIB, 24 * GIB, 0.98, 650.4, 700.0, 61)
    view = drawn(run_of(2, cards={0: (card,), 1: (card,)}, matmul_flops_s=1e14))
    for words in (
        "2 GPU ranks", "running  3 min 12 s left", "step 12/60", "20%", "loss 1.800", "smoothed 2.250",
        "held-out 2.300 to 1.400 (step 12)", "1,024 tok/s now", "1,024 on average", "MFU", "padding 0.0%",
        "checkpoint step 10, 1 min 00 s ago", "98%", "650/700 W", "61 C", "learning rate",
    ):  # fmt: skip
        assert words in view


def test_useful_tokens_are_told_from_all_tokens_where_there_is_padding() -> None:
    snapshot = run_of(1)
    snapshot.fold.add([Event(kind="step", step=n, tokens=4096, padding=4096, seconds=4.0) for n in range(13, 33)])
    assert "1,024 useful tok/s now, 2,048 with padding" in drawn(snapshot, 120)
    assert "useful" not in drawn(run_of(1), 120)


def test_a_wide_terminal_has_charts_beside_the_ranks() -> None:
    lines = drawn(run_of(2), 200, 50).splitlines()
    (head,) = [line for line in lines if "predicted" in line and "peak" in line]
    assert "loss   ● held-out" in head


@pytest.mark.parametrize("width", range(55, 110))
def test_the_head_of_a_bar_is_whole_words_that_it_has_room_for(width: int) -> None:
    lines = drawn(run_of(2, device=CPU), width).splitlines()
    head, line = next(pair for pair in itertools.pairwise(lines) if pair[0].lstrip().startswith("rank "))
    named = head.rstrip().removesuffix("tok/s") == head.rstrip()
    assert named == line.rstrip().endswith("%")
    assert not named or head.rstrip().endswith("tok/s  peak of predicted") or head.rstrip().endswith("  of predicted")


def test_cpu_ranks_show_their_memory_and_no_sensors() -> None:
    view = drawn(run_of(2, device=CPU))
    assert "2 CPU ranks" in view
    assert "1.0 GiB" in view
    assert "power" not in view


def test_a_run_that_was_asked_to_stop_says_so() -> None:
    assert "stopping" in drawn(run_of(2, stopping=True)).splitlines()[0]


def test_a_constant_has_one_label() -> None:
    lines = [line.plain for line in plot("lr", range(5), [2.0] * 5, width=20, height=8)]
    assert sum("2│" in line for line in lines) == 1


def test_every_rank_says_what_it_is_at() -> None:
    view = drawn(run_of(2), 120, 24, "ranks")
    assert view.count("in forward and backward passes of step 13") == 2
    assert view.count("2 s ago") == 2


def test_what_a_rank_is_at_is_never_cut_off_in_its_pane() -> None:
    lines = drawn(run_of(2), 80, 24, "ranks").splitlines()
    assert sum(line.strip() == "in forward and backward passes of step 13" for line in lines) == 2
    assert "the 7 fullest of 64; a taller terminal" in drawn(run_of(64), 80, 24, "ranks")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "failed", "message": "rank 1 died: out of memory", "try_": "micro_batch=1"},
         ("failed: rank 1 died: out of memory", "try: micro_batch=1")),
        ({"state": "failed", "message": "rank 1 died:\n" + "a line of its log\n" * 30, "try_": "--resume"},
         ("failed: rank 1 died", "try: --resume")),
        ({"state": "killed", "message": "without a word", "try_": "--resume"},
         ("killed: without a word", "try: --resume")),
        ({"state": "stopped"}, ("stopped",)),
        ({"state": "planned"}, ("waiting for the ranks",)),
        ({"troubles": ("rank 1 has been silent for 31 s",)}, ("! rank 1 has been silent for 31 s",)),
    ],
)  # fmt: skip
def test_how_a_run_is_or_ended_is_said(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    view = drawn(run_of(2, **fields))
    assert [one for one in words if one not in view] == []


def test_a_run_without_a_step_can_be_seen() -> None:
    view = drawn(run_of(1, steps=0, pulses={}))
    assert "starting" in view
    assert "no numbers yet" in view


def test_a_loss_that_is_no_number_is_drawn_as_a_gap_and_said() -> None:
    one = run_of(1)
    one.fold.add([Event(kind="step", step=13, total_steps=60, loss=math.nan)])
    assert "loss is NaN or infinite at step 13" in drawn(one)


def test_nothing_from_a_file_can_touch_the_terminal() -> None:
    view = drawn(run_of(1, log=("a [red]b[/red] \x1b[2Jc\tde",)), pane="log")
    assert "a [red]b[/red] c" in view
    assert "\x1b" not in view


def test_a_terminal_without_unicode_gets_ascii() -> None:
    for pane in PANES:
        assert drawn(run_of(9), pane=pane, encoding="ascii").isascii()


def test_no_colour_is_written_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    Console(width=80, height=24, force_terminal=True, file=file).print(dashboard(run_of(2), 80, 24))
    assert "\x1b[3" not in file.getvalue()


def test_a_curve_falls_from_its_highest_at_the_left_to_its_lowest_at_the_right() -> None:
    lines = [line.plain for line in plot("loss", range(1, 9), [float(8 - n) for n in range(8)], width=14, height=6)]
    assert [len(line) for line in lines] == [14] * 6
    assert lines[1].startswith("        8│") or lines[1].strip().startswith("8│")
    assert lines[1][10] != "⠀"
    assert lines[1][13] == "⠀"
    assert lines[4][10] == "⠀"
    assert lines[4][13] != "⠀"
    assert lines[5].endswith("└1  8")


def test_a_spike_among_very_many_steps_sets_the_bounds_of_its_chart() -> None:
    values = [1.0] * 50_000
    values[25_000] = 9.0
    lines = plot("loss", range(50_000), values, width=40, height=8)
    assert lines[1].plain.strip().startswith("9│")


def test_time_left_is_counted_down_through_a_step_and_no_further() -> None:
    def left(ago: float) -> str:
        one = run_of(2)
        for index in range(len(one.fold.columns)):
            one.fold.columns.time[index] = NOW - ago - 4.0 * (11 - index)
        return drawn(one).splitlines()[0].partition("running")[2].strip()

    assert [left(0), left(3), left(300)] == ["3 min 12 s left", "3 min 09 s left", "3 min 08 s left"]


@pytest.mark.parametrize(
    ("phase", "word"), [("loading", "loading"), ("evaluating", "evaluating"), ("saving", "saving")]
)
def test_what_a_run_does_beside_training_is_said(phase: Any, word: str) -> None:
    pulse = Heartbeat(rank=0, pid=1, host="here", time=NOW, phase=phase)
    assert word in drawn(run_of(1, steps=0, pulses={0: pulse})).splitlines()[0]
