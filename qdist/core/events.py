"""What a running rank says each step, and what a reader makes of it."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Literal

import msgspec

from qdist.core.errors import RunError

Kind = Literal["load", "start", "step", "eval", "verify", "checkpoint", "resume", "end"]

_UNSTEADY = 3
"""First steps of a run, in which kernels are chosen and memory grows."""
_WINDOW = 10
"""Steps over which speed and smoothed loss are taken."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One JSON line of `events/rank000.jsonl`. Only what means something for the kind is written.

    A float that is NaN or infinite is written as null and read back as NaN: JSON has neither, and absent is None.
    """

    kind: Kind
    step: int = 0
    """Optimizer steps finished so far. For `start` and `resume`: the step that the run goes on from."""
    total_steps: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int = 0
    """Of all ranks, in this step."""
    seconds: float = 0.0
    """Of this step; for `load`, of loading the backbone."""
    read_bytes: int = 0
    """For `load`: what this rank had from the disk, pages that were in memory already not counted."""
    memory_bytes: int = 0
    """This rank's peak so far; on the CPU, its largest resident set."""
    rank: int = 0
    time: float = 0.0
    """Seconds since the epoch, given by the caller."""
    skipped: bool = False
    """The update was not made, the gradients being NaN or infinite."""
    note: str = ""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """A run so far, folded from the events of all ranks. Losses and speed are rank 0's word, which speaks for all."""

    step: int = 0
    total_steps: int = 0
    learning_rate: float | None = None
    gradient_norm: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss), steps ascending."""
    held_out: tuple[tuple[int, float], ...] = ()
    recent: tuple[tuple[int, float], ...] = ()
    """(tokens, seconds) of the last steps since the run was last started."""
    memory_bytes: dict[int, int] = {}
    """Peak of each rank that has spoken."""
    skipped_steps: tuple[int, ...] = ()
    finished: bool = False

    @property
    def loss(self) -> float | None:
        """Of the last step."""
        return self.losses[-1][1] if self.losses else None

    @property
    def smoothed_loss(self) -> float | None:
        """Mean of the last steps whose loss is a number."""
        finite = [loss for _, loss in self.losses[-_WINDOW:] if math.isfinite(loss)]
        return fmean(finite) if finite else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median of the last steps, so that one checkpoint or compilation does not show."""
        speeds = [tokens / seconds for tokens, seconds in self.recent if seconds > 0]
        return median(speeds) if speeds else None

    @property
    def seconds_left(self) -> float | None:
        """At the median pace of the last steps."""
        if self.finished:
            return 0.0
        if not self.recent or not self.total_steps:
            return None
        return max(0, self.total_steps - self.step) * median(seconds for _, seconds in self.recent)


def encode(event: Event) -> bytes:
    """One line, newline included, to be written in a single append."""
    return msgspec.json.encode(event) + b"\n"


def decode_lines(data: bytes, *, first_line: int = 1) -> list[Event]:
    """Events of every line that ends; what follows the last newline was torn by a kill and is left out.

    first_line: number of the first line, for a reader that goes on where it stopped.

    Raises RunError, naming the line, when a line that ends is not an event.
    """
    lines = data[: whole_length(data)].split(b"\n")[:-1]
    return [_decode(line, number) for number, line in enumerate(lines, first_line)]


def whole_length(data: bytes) -> int:
    """Bytes up to the end of the last whole line: where a resumed rank cuts its file before it appends."""
    return data.rfind(b"\n") + 1


def _decode(line: bytes, number: int) -> Event:
    try:
        fields = msgspec.json.decode(line, type=dict[str, str | int | float | bool | None])
        return msgspec.convert({key: math.nan if value is None else value for key, value in fields.items()}, Event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"line {number} of the events is not an event: {error}",
            try_="look at that line; the run itself does not need it, so it may be taken out",
        ) from error


def losses(events: Iterable[Event]) -> dict[int, float]:
    """Loss of each step from one rank's events: the last word on each, since a resumed run repeats steps.

    A `start` or `resume` takes back the steps after it: until they are repeated, they did not happen.
    """
    found: dict[int, float] = {}
    for event in events:
        if event.kind in ("start", "resume"):
            found = {step: loss for step, loss in found.items() if step <= event.step}
        elif event.kind == "step" and event.loss is not None:
            found[event.step] = event.loss
    return dict(sorted(found.items()))


def steady_tokens_s(events: Iterable[Event]) -> float | None:
    """Median speed of the last stretch, from one rank's events: without its first steps where it has more."""
    speeds: list[float] = []
    for event in events:
        if event.kind in ("start", "resume"):
            speeds = []
        elif event.kind == "step" and event.seconds > 0:
            speeds.append(event.tokens / event.seconds)
    return median(speeds[_UNSTEADY:] or speeds) if speeds else None


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """How a run came to its first step. Seconds are from when its plan was written; None where nobody said."""

    load_s: float | None
    """Until the last rank had its backbone."""
    first_step_s: float | None
    """Until the first step was done."""
    loading_s: float
    """What the slowest rank spent on loading; 0 where nobody said."""
    read_bytes: int
    """From disk while loading, all ranks together."""


def start_of(events: Iterable[Event], *, planned_at: float) -> Start:
    """From the events of all ranks; those from before the plan are of an earlier launch."""
    since = [event for event in events if event.time >= planned_at]
    loads = {event.rank: event for event in since if event.kind == "load"}
    steps = [event.time for event in since if event.kind == "step"]
    return Start(
        load_s=max(event.time for event in loads.values()) - planned_at if loads else None,
        first_step_s=min(steps) - planned_at if steps else None,
        loading_s=max((event.seconds for event in loads.values()), default=0.0),
        read_bytes=sum(event.read_bytes for event in loads.values()),
    )


def advance(state: RunState, events: Sequence[Event]) -> RunState:
    """The state after more events, each rank's in its own order."""
    memory_bytes = dict(state.memory_bytes)
    for event in events:
        if event.memory_bytes:
            before = 0 if event.kind in ("start", "resume") else memory_bytes.get(event.rank, 0)
            memory_bytes[event.rank] = max(before, event.memory_bytes)
    for restart, chunk in _stretches([event for event in events if event.rank == 0]):
        state = _go_back(state, restart) if restart else state
        state = _go_on(state, chunk)
    return msgspec.structs.replace(state, memory_bytes=memory_bytes)


def _stretches(events: Sequence[Event]) -> list[tuple[Event | None, list[Event]]]:
    """Split at each start or resume, so that state is copied once a stretch and not once an event."""
    stretches: list[tuple[Event | None, list[Event]]] = [(None, [])]
    for event in events:
        if event.kind in ("start", "resume"):
            stretches.append((event, []))
        else:
            stretches[-1][1].append(event)
    return stretches


def _go_back(state: RunState, restart: Event) -> RunState:
    """Take back the steps after a start or resume: until they are repeated, they did not happen."""
    return msgspec.structs.replace(
        state,
        step=restart.step,
        total_steps=restart.total_steps or state.total_steps,
        losses=tuple(point for point in state.losses if point[0] <= restart.step),
        held_out=tuple(point for point in state.held_out if point[0] <= restart.step),
        skipped_steps=tuple(step for step in state.skipped_steps if step <= restart.step),
        recent=(),
        finished=False,
    )


def _go_on(state: RunState, events: Sequence[Event]) -> RunState:
    if not events:
        return state
    steps = [event for event in events if event.kind == "step"]
    last = steps[-1] if steps else None
    new_losses = ((event.step, event.loss) for event in steps if event.loss is not None)
    new_held_out = ((event.step, event.held_out_loss) for event in events if event.held_out_loss is not None)
    timed = ((event.tokens, event.seconds) for event in steps if event.seconds > 0)
    return msgspec.structs.replace(
        state,
        step=max(state.step, *(event.step for event in events)),
        total_steps=next((event.total_steps for event in reversed(events) if event.total_steps), state.total_steps),
        learning_rate=last.learning_rate if last else state.learning_rate,
        gradient_norm=last.gradient_norm if last else state.gradient_norm,
        losses=_latest(state.losses, new_losses),
        held_out=_latest(state.held_out, new_held_out),
        recent=(*state.recent, *timed)[-_WINDOW:],
        skipped_steps=(*state.skipped_steps, *(event.step for event in steps if event.skipped)),
        finished=state.finished or any(event.kind == "end" for event in events),
    )


def _latest(old: Iterable[tuple[int, float]], new: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted({**dict(old), **dict(new)}.items()))
