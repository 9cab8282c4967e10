import math

from qdist.core.telemetry.events import Event
from qdist.core.telemetry.history import RunHistory, Stretch


def folded(events: list[Event]) -> RunHistory:
    fold = RunHistory()
    fold.add(events)
    return fold


def step(
    number: int,
    loss: float | None = None,
    *,
    rank: int = 0,
    memory_bytes: int = 0,
    seconds: float = 2.0,
    time: float = 0.0,
    busy_s: float = 0.0,
    padding: int = 0,
) -> Event:
    return Event(
        kind="step", step=number, total_steps=60, loss=loss, tokens=1000, own_tokens=500, seconds=seconds,
        rank=rank, memory_bytes=memory_bytes, time=time, busy_s=busy_s, data_s=seconds / 10, padding=padding,
    )  # fmt: skip


def test_a_resume_takes_back_the_steps_after_its_checkpoint() -> None:
    state = folded([
        step(1, 3.0), Event(kind="checkpoint", step=1), step(2, 2.5), step(3, 2.0),
        Event(kind="checkpoint", step=3, time=3.0), Event(kind="resume", step=1, time=9.0), step(2, 2.4, time=10.0),
    ])  # fmt: skip
    assert (state.step, state.columns.step.tolist(), state.columns.loss.tolist()) == (2, [1, 2], [3.0, 2.4])
    assert (state.checkpoints, state.resumed, state.finished) == ([(1, 0.0)], [(1, 9.0)], False)


def test_a_state_does_not_depend_on_how_its_events_were_cut_up() -> None:
    events = [
        Event(kind="start", total_steps=60),
        *(step(number, 3.0 - number / 10, seconds=number) for number in range(1, 16)),
        Event(kind="eval", step=15, held_out_loss=2.0),
        Event(kind="resume", step=12),
        *(step(number, 2.0, rank=rank, memory_bytes=number + rank) for number in (13, 14) for rank in (0, 1)),
        Event(kind="end", step=14),
    ]
    state = RunHistory()
    for event in events:
        state.add([event])
    whole = folded(events)
    for kept in ("step", "total_steps", "finished", "held_out", "stretches", "tokens_per_s", "seconds_left"):
        assert getattr(state, kept) == getattr(whole, kept), kept
    for name, column in vars(state.columns).items():
        assert column.tobytes() == vars(whole.columns)[name].tobytes(), name
    assert whole.columns.step.tolist() == [*range(1, 15)]


def test_speed_and_time_left_come_from_the_last_ten_steps() -> None:
    slow_start = [step(number, seconds=100.0) for number in (1, 2, 3)]
    state = folded([*slow_start, *(step(number) for number in range(4, 14))])
    assert state.tokens_per_s == 500.0
    assert state.seconds_left == (60 - 13) * 2.0


def test_one_slow_step_does_not_change_the_pace() -> None:
    state = folded([step(1, seconds=300.0), *(step(number) for number in range(2, 6))])
    assert (state.tokens_per_s, state.seconds_left) == (500.0, 110.0)


def test_the_pace_is_unknown_before_the_first_step_and_nothing_is_left_after_the_end() -> None:
    started = folded([Event(kind="start", total_steps=60)])
    assert (started.total_steps, started.tokens_per_s, started.seconds_left, started.loss) == (60, None, None, None)
    started.add([step(40), Event(kind="end", step=40)])
    assert (started.finished, started.seconds_left) == (True, 0.0)


def test_memory_is_the_peak_of_each_rank_and_losses_are_those_of_rank_0() -> None:
    events = [step(1, 2.0, memory_bytes=5), step(1, 9.0, rank=1, memory_bytes=8), step(2, 9.0, rank=1, memory_bytes=6)]
    state = folded(events)
    assert {number: rank.memory_bytes for number, rank in state.ranks.items()} == {0: 5, 1: 8}
    assert (state.step, state.loss) == (1, 2.0)


def test_smoothed_loss_passes_over_what_is_not_a_number() -> None:
    state = folded([step(1, 2.0), step(2, math.nan), step(3, 4.0)])
    assert state.smoothed_loss == 3.0
    assert folded([step(1, math.nan)]).smoothed_loss is None


def test_held_out_losses_and_skipped_steps_are_kept() -> None:
    events = [
        Event(kind="eval", step=0, held_out_loss=3.0),
        Event(kind="step", step=1, skipped=True),
        Event(kind="eval", step=1, held_out_loss=2.0),
    ]
    state = folded(events)
    assert state.held_out == [(0, 3.0), (1, 2.0)]
    assert state.skipped == [1]


def test_figures_of_tasks_are_kept_by_task_and_taken_back_by_a_resume() -> None:
    def measured(step: int, figure: float) -> Event:
        return Event(kind="eval", step=step, task="mmlu:a", figure=figure, rises=True)

    events = [measured(0, 0.25), measured(2, 0.5), measured(4, 0.3), measured(4, 0.4)]
    state = folded([*events, Event(kind="end", step=4, note="stopped early at step 4 of 9")])
    assert state.tasks == {"mmlu:a": [(0, 0.25), (2, 0.5), (4, 0.4)]}
    assert (state.rising, state.held_out, state.ended_early) == ({"mmlu:a"}, [], "stopped early at step 4 of 9")
    state.add([Event(kind="resume", step=2)])
    assert (state.tasks, state.ended_early) == ({"mmlu:a": [(0, 0.25), (2, 0.5)]}, "")


def test_time_is_counted_from_loading_to_the_last_word_of_each_launch() -> None:
    def launch(began: float, first: str, at: int) -> list[Event]:
        return [
            Event(kind="load", seconds=5.0, time=began + 5),
            Event(kind=first, step=at, time=began + 6),  # type: ignore[arg-type]
            step(at + 1, 2.0, time=began + 20),
        ]

    state = folded([*launch(100.0, "start", 0), *launch(500.0, "resume", 1)])
    assert state.stretches == [Stretch(100.0, 120.0, True), Stretch(500.0, 520.0, True)]
    assert state.trained_s == 40.0


def test_the_slowest_rank_is_named_and_by_how_much() -> None:
    events = [step(number, rank=rank, busy_s=1.0 + rank / 10) for number in range(1, 13) for rank in range(3)]
    state = folded(events)
    slowest, share = state.skew or (0, 0.0)
    assert slowest == 2
    assert math.isclose(share, 0.2)
    assert state.ranks[0].tokens_per_s == 500.0
    assert folded([step(1, busy_s=1.0)]).skew is None


def test_a_few_milliseconds_set_no_rank_apart_and_ten_slow_steps_do() -> None:
    def at(busy_s: float, late_s: float) -> float:
        busy = {0: [busy_s] * 210, 1: [busy_s] * 200 + [late_s] * 10}
        events = [step(n, rank=rank, busy_s=own) for rank in busy for n, own in enumerate(busy[rank], 1)]
        return (folded(events).skew or (0, 0.0))[1]

    assert at(0.02, 0.03) == 0
    assert math.isclose(at(1.0, 1.5), 0.5)


def test_ranks_that_an_earlier_launch_had_are_not_compared() -> None:
    first = [step(number, rank=rank, busy_s=1.0, time=float(number)) for number in (1, 2) for rank in range(3)]
    resumed = [
        event
        for rank in range(2)
        for event in (
            Event(kind="load", rank=rank, seconds=3.0, time=20.0),
            Event(kind="resume", rank=rank, step=2, time=21.0),
            step(3, rank=rank, busy_s=2.0, time=23.0),
        )
    ]
    state = folded([*first, *resumed])
    assert sorted(state.present) == [0, 1]
    assert state.skew == (0, 0.0)


def test_a_peak_is_of_the_last_launch_however_many_events_come_at_once() -> None:
    state = folded([step(number, memory_bytes=50) for number in range(1, 11)])
    state.add([Event(kind="resume", step=10), *(step(number, memory_bytes=5) for number in range(11, 90))])
    assert state.ranks[0].memory_bytes == 5


def test_time_left_counts_evaluations_and_checkpoints_as_there_were_so_far() -> None:
    """Of 60 steps of 2 s, each tenth is followed by 30 s of something else."""
    started = Event(kind="start", total_steps=60)
    state = folded([started, *(step(number, time=2.0 * number + 30 * ((number - 1) // 10)) for number in range(1, 42))])
    assert state.seconds_left == (60 - 41) * (2.0 + 4 * 30 / 40)
    state.add([Event(kind="resume", step=41, time=1e6), step(42, time=1e6 + 2)])
    assert state.seconds_left == (60 - 42) * 2.0


def test_positions_a_second_count_padding_too() -> None:
    state = folded([step(number, padding=500) for number in range(1, 6)])
    assert state.positions_per_s == 1.5 * (state.tokens_per_s or 0.0)
    assert folded([]).positions_per_s is None


def test_padding_and_data_are_shares() -> None:
    state = folded([step(1, padding=1000), step(2, padding=0)])
    assert state.padding_share == 1000 / 3000
    assert math.isclose(state.data_share or 0, 0.1)
    assert state.mean_tokens_per_s == 500.0
    assert folded([]).padding_share is folded([]).data_share is None
