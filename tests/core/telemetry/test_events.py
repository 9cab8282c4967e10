import math

import pytest

from qdist.core.telemetry.events import (
    Event,
    Start,
    decode_blocks,
    decode_lines,
    encode,
    losses,
    start_of,
    steady_speed,
    whole_length,
)


def step(
    number: int,
    loss: float | None = None,
    *,
    rank: int = 0,
    memory_bytes: int = 0,
    seconds: float = 2.0,
    time: float = 0.0,
) -> Event:
    return Event(
        kind="step", step=number, total_steps=60, loss=loss, tokens=1000, seconds=seconds,
        rank=rank, memory_bytes=memory_bytes, time=time,
    )  # fmt: skip


def test_an_event_is_one_line_that_holds_only_what_matters() -> None:
    assert encode(Event(kind="step", step=3, loss=1.5)) == b'{"kind":"step","step":3,"loss":1.5}\n'


def test_events_come_back_as_they_were_written() -> None:
    events = [
        Event(kind="start", total_steps=2, note="nf4 on 2 GPUs\nand a newline", time=12.5),
        Event(kind="step", step=1, loss=2.0, learning_rate=2e-4, gradient_norm=0.5, tokens=7, seconds=0.1, rank=3),
        Event(kind="eval", step=1, held_out_loss=2.25, skipped=True, memory_bytes=2**40),
    ]
    assert decode_lines(b"".join(map(encode, events))) == events


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_a_number_does_not_read_as_absent(value: float) -> None:
    (event,) = decode_lines(encode(Event(kind="step", step=3, loss=value)))
    assert event.loss is not None
    assert math.isnan(event.loss)
    assert event.gradient_norm is None


def test_a_line_torn_by_a_kill_is_left_out_wherever_it_is_torn() -> None:
    whole = encode(step(1, 2.0))
    torn = encode(step(2, 1.9))
    for length in range(len(torn)):
        data = whole + torn[:length]
        assert [event.step for event in decode_lines(data)] == [1]
        assert whole_length(data) == len(whole)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"\0\0\0",
        b'{"kind":"stop"}',
        b'{"kind":"step","stepp":1}',
        b'{"step":1}',
        b'{"kind":"step","step":1000000000000000000000}',
        b"[" * 100_000,
    ],
)
def test_garbage_in_the_middle_is_left_out_and_its_line_is_named(garbage: bytes) -> None:
    data = encode(step(1)) + garbage + b"\n" + encode(step(2))
    assert [event.step for event in decode_lines(data)] == [1, 2]
    (block,) = decode_blocks(data, first_line=41)
    assert (block.bad, block.lines) == ((42,), 3)


def test_an_event_behind_nul_bytes_of_a_lost_one_is_read() -> None:
    data = encode(step(1)) + b"\0" * 200 + encode(step(3))
    (block,) = decode_blocks(data)
    assert ([event.step for event in block.events], block.bad) == ([1, 3], ())


def test_nothing_written_yet_is_no_events() -> None:
    assert decode_lines(b"") == []


def test_the_last_word_on_a_step_counts() -> None:
    assert losses([step(1, 3.0), step(2, 2.0), step(2, 1.5), step(3)]) == {1: 3.0, 2: 1.5}


def test_a_backbone_that_was_verified_changes_no_loss() -> None:
    verified = Event(kind="verify", step=2, total_steps=60, note="1.9 GiB unchanged")
    assert decode_lines(encode(verified)) == [verified]
    events = [Event(kind="start", total_steps=60), step(1, 3.0), step(2, 2.0)]
    assert losses([*events, verified]) == {1: 3.0, 2: 2.0}


def test_a_resume_takes_back_the_steps_after_its_checkpoint() -> None:
    events = [step(1, 3.0), step(2, 2.5), step(3, 2.0), Event(kind="resume", step=1), step(2, 2.4)]
    assert losses(events) == {1: 3.0, 2: 2.4}


@pytest.mark.parametrize(
    ("seconds", "speed"), [((8, 4, 4, 2, 1, 2), 500.0), ((8, 4, 2), 250.0), ((8,), 125.0), ((), None)]
)
def test_steady_speed_leaves_the_first_steps_out_where_there_are_more(
    seconds: tuple[float, ...], speed: float | None
) -> None:
    before = [Event(kind="start"), *(step(number, seconds=0.1) for number in range(9)), Event(kind="resume")]
    steps = [step(number, seconds=took) for number, took in enumerate(seconds, 1)]
    assert steady_speed([*before, *steps]).tokens_s == speed


def test_steady_speed_leaves_out_steps_before_passes_are_captured_and_the_one_that_captures() -> None:
    launched = [step(number, seconds=8) for number in range(1, 6)]
    watched = Event(kind="gradients", step=5)
    captured = [step(6, seconds=4), step(7, seconds=2), step(8, seconds=2)]
    assert steady_speed([Event(kind="start"), *launched, watched, *captured]).tokens_s == 500.0
    assert steady_speed([Event(kind="start"), *launched, watched]).tokens_s == 125.0


def load(rank: int, *, time: float, seconds: float = 1.0, read_bytes: int = 0) -> Event:
    return Event(kind="load", rank=rank, time=time, seconds=seconds, read_bytes=read_bytes)


def test_a_start_is_counted_from_the_plan_of_this_launch() -> None:
    earlier = [load(0, time=50.0, seconds=90.0, read_bytes=7), step(1, time=60.0)]
    now = [
        load(0, time=110.0, seconds=5.0, read_bytes=10), load(1, time=112.0, seconds=6.5, read_bytes=20),
        Event(kind="resume", step=1, time=113.0), step(2, time=120.0), step(3, time=125.0),
    ]  # fmt: skip
    assert start_of([*earlier, *now], planned_at=100.0) == Start(
        load_s=12.0, first_step_s=20.0, loading_s=6.5, read_bytes=30
    )


def test_what_the_held_out_loss_took_is_not_of_the_first_step() -> None:
    begun = Event(kind="starting", note="imports 5.00 s", time=106.0)
    judged, later = (Event(kind="eval", held_out_loss=2.0, time=time) for time in (118.0, 140.0))
    other = Event(kind="starting", rank=1, note="imports 6.00 s", time=106.0)
    whole = start_of([other, begun, judged, step(1, time=120.0), later], planned_at=100.0)
    assert whole.phases == {"imports": 5.0, "evaluation": 12.0, "first step": 2.0}
    bare = start_of([begun, step(1, time=120.0), later], planned_at=100.0)
    assert bare.phases == {"imports": 5.0, "first step": 14.0}


def test_a_start_of_which_nobody_spoke_is_unknown() -> None:
    assert start_of([], planned_at=100.0) == Start(load_s=None, first_step_s=None, loading_s=0.0, read_bytes=0)


def test_many_lines_are_read_as_one_by_one() -> None:
    events = [step(number, 3.0 if number % 5000 else math.nan, time=float(number)) for number in range(1, 30_001)]
    data = b"".join(map(encode, events))
    assert len(data) > 2 << 20
    blocks = list(decode_blocks(data + b'{"torn'))
    assert len(blocks) > 2
    found = [event for block in blocks for event in block.events]
    assert [event.step for event in found] == [event.step for event in events]
    assert [number.step for number in found if math.isnan(number.loss or 0)] == list(range(5000, 30_001, 5000))
    assert [block.bad for block in decode_blocks(data + b"[]\n")][-1] == (30_001,)
