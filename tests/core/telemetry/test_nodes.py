"""Do a run's nodes come out right, whatever happened to them and in whatever order it was written down?"""

import random
from typing import Any, Literal

import msgspec
import pytest

from qdist.core.telemetry.events import Event
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodeEvent, NodeMember, NodesNow, fold_nodes, generations_in_words, nodes_in_words

Kind = Literal["formed", "lost", "waiting", "returned", "stopped", "finished", "failed"]


def member(name: str, *ranks: int) -> NodeMember:
    return NodeMember(node="abc".index(name), name=name, address=f"10.0.0.{1 + 'abc'.index(name)}", ranks=ranks)


def formed(names: str, *, generation: int = 1, time: float = 100.0, step: int = 0) -> NodeEvent:
    """A generation of nodes, by their letters, of one rank each."""
    members = tuple(member(name, rank) for rank, name in enumerate(names))
    return NodeEvent(kind="formed", time=time, generation=generation, step=step, members=members)


def told(kind: Kind, name: str = "", *, generation: int = 1, time: float = 200.0, **fields: Any) -> NodeEvent:
    return NodeEvent(kind=kind, name=name, generation=generation, time=time, **fields)


LOST = told("lost", "b", seconds=12.0)
REGROWN = (
    formed("abc"), LOST, formed("ac", generation=2, time=230.0, step=40),
    told("returned", "b", generation=2, time=300.0), formed("abc", generation=3, time=340.0, step=120),
)  # fmt: skip


def folded(*events: NodeEvent) -> NodesNow:
    seen = fold_nodes(events)
    assert seen is not None
    return seen


def names(seen: NodesNow) -> str:
    return "".join(one.name for one in seen.members)


def test_a_run_of_one_machine_has_no_nodes() -> None:
    assert fold_nodes([]) is None


def test_the_newest_generation_says_who_takes_part_and_where_each_rank_is() -> None:
    seen = folded(formed("abc"), formed("ac", generation=2))
    assert (names(seen), seen.name_of_rank) == ("ac", {0: "a", 1: "c"})


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (REGROWN[:1], []),
        (REGROWN[:2], ["b has not been heard of for 32 s"]),
        (REGROWN[:3], ["b has not been heard of for 32 s: the run goes on with a, c"]),
        (REGROWN[:4], ["b is back, and the run is about to grow"]),
        (REGROWN, []),
        (
            (formed("ab"), LOST, told("waiting", note="a waits for b, up to 10 min")),
            ["a waits for b, up to 10 min", "b has not been heard of for 32 s"],
        ),
        (
            (formed("ab"), LOST, told("waiting")),
            ["too few nodes are left: waiting for b", "b has not been heard of for 32 s"],
        ),
        ((formed("ab"), LOST, told("failed")), []),
    ],
)
def test_who_is_lost_waited_for_or_back_is_said_until_it_is_over(
    events: tuple[NodeEvent, ...], said: list[str]
) -> None:
    assert nodes_in_words(folded(*events), 220.0) == said


def test_a_node_that_was_cut_off_says_nothing_about_a_later_generation() -> None:
    late = told("lost", "a", generation=1, time=400.0)
    assert folded(*REGROWN, late, told("waiting", generation=1)) == folded(*REGROWN)


def test_a_line_that_was_copied_twice_counts_once() -> None:
    assert folded(*REGROWN, *REGROWN) == folded(*REGROWN)


def test_a_generation_that_several_nodes_note_counts_once() -> None:
    again = msgspec.structs.replace(REGROWN[-1], time=343.0)
    assert folded(*REGROWN, again) == folded(*REGROWN)
    assert folded(*REGROWN[:3], LOST, msgspec.structs.replace(REGROWN[2], time=228.0)) == folded(*REGROWN[:3])


def test_a_node_whose_loss_nobody_noted_is_missing_all_the_same() -> None:
    """On a shared disk the first node writes the events: none that it is gone."""
    seen = folded(formed("abc"), formed("bc", generation=2, time=230.0, step=40))
    assert nodes_in_words(seen, 250.0) == ["a has not been heard of for 20 s: the run goes on with b, c"]
    assert generations_in_words(seen, history()).startswith("2 generations; a lost at step 45; ")


def test_a_node_that_is_back_may_be_told_without_its_name() -> None:
    back = told("returned", generation=2, note="another node is there: the run saves, and goes on with it")
    assert nodes_in_words(folded(*REGROWN[:3], back), 320.0) == [back.note]


def test_a_launch_after_the_end_misses_nobody() -> None:
    seen = folded(formed("ab"), LOST, told("stopped"), formed("a", generation=1, time=900.0))
    assert (seen.missing, seen.ended, names(seen), seen.paused_s) == ((), "", "a", 0.0)


def test_a_launch_after_the_end_that_waits_for_nodes_says_so() -> None:
    end, late = told("stopped"), told("waiting", generation=1, note="too late")
    assert nodes_in_words(folded(formed("ab"), end, late), 220.0) == []
    assert nodes_in_words(folded(formed("ab"), end, told("waiting", generation=0, note="waits")), 220.0) == ["waits"]


def test_what_a_run_waits_for_before_it_begins_is_no_time_without_ranks() -> None:
    assert folded(told("waiting", generation=0, time=50.0), formed("ab")).paused_s == 0.0


def test_time_without_ranks_runs_from_the_last_sign_of_a_node_to_the_next_generation() -> None:
    assert folded(*REGROWN).paused_s == (230 - 200 + 12) + (340 - 300)


def history() -> RunHistory:
    """Steps of 2 s: 45 done, begun again from 40; 120 done, begun again from 120."""
    fold = RunHistory()

    def steps(first: int, last: int, began: float) -> list[Event]:
        return [Event(kind="step", step=step, loss=1.0, seconds=2.0, time=began + step) for step in range(first, last)]

    fold.add([
        Event(kind="start", step=0, time=101.0), *steps(1, 46, 110), Event(kind="resume", step=40, time=235.0),
        *steps(41, 121, 236), Event(kind="resume", step=120, time=345.0), *steps(121, 130, 346),
    ])  # fmt: skip
    return fold


def test_a_report_says_what_generations_cost() -> None:
    assert generations_in_words(folded(*REGROWN), history()) == (
        "3 generations; b lost at step 45, back at step 120; 10 s of work done twice; "
        "1 min 22 s until ranks were started again"
    )
    assert generations_in_words(folded(formed("abc")), RunHistory()) == ""


def test_steps_before_the_first_checkpoint_are_done_again_from_the_start() -> None:
    fold = RunHistory()
    fold.add([
        Event(kind="start", time=1.0), Event(kind="step", step=1, seconds=3.0, time=4.0), Event(kind="start", time=9.0),
    ])  # fmt: skip
    assert (fold.repeated_s, fold.step_reached(5.0), fold.step_reached(10.0)) == (3.0, 1, 0)


def random_event(drawn: random.Random) -> NodeEvent:
    kinds: tuple[Kind, ...] = ("formed", "lost", "waiting", "returned", "stopped", "finished", "failed")
    kind, generation, time = drawn.choices(kinds, (4, 4, 2, 2, 1, 1, 1))[0], drawn.randint(0, 4), drawn.uniform(0, 500)
    if kind == "formed":
        return formed("".join(sorted(drawn.sample("abc", drawn.randint(1, 3)))), generation=generation, time=time)
    return told(kind, drawn.choice("abc"), generation=generation, time=time, seconds=drawn.uniform(0, 20))


@pytest.mark.parametrize("seed", range(300))
def test_any_order_of_events_gives_a_consistent_state(seed: int) -> None:
    drawn = random.Random(seed)
    events = [random_event(drawn) for _ in range(drawn.randint(1, 30))]
    before = NodesNow()
    for count in range(1, len(events) + 1):
        seen = folded(*events[:count])
        check(seen)
        assert seen.paused_s >= before.paused_s
        assert len(seen.generations) >= len(before.generations)
        assert nodes_in_words(seen, 600.0) == [] or seen.missing or seen.waiting or seen.returning
        before = seen


def check(seen: NodesNow) -> None:
    """What holds at any time."""
    missing = [one.name for one in seen.missing]
    assert len(missing) == len(set(missing))
    assert all(one in seen.absences for one in seen.missing)
    assert all(one.back is None for one in seen.missing)
    assert seen.down == set(missing) & set(names(seen))
    assert not (seen.returning or seen.waiting) or seen.since is not None
    if seen.ended:
        assert (missing, seen.waiting, seen.returning, seen.since) == ([], "", "", None)
    generations_in_words(seen, RunHistory())
