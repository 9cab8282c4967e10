"""A run so far, folded from the events of its ranks: what the monitor shows and the report draws.

Losses, speed and times of steps are rank 0's word, which speaks for all. A `start` or `resume` takes back the steps
after it: until they are repeated, they did not happen.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import chain, groupby
from operator import add
from statistics import fmean, median
from typing import NamedTuple

from qdist.core.telemetry.events import Event

_WINDOW = 10
"""Steps over which speed and smoothed loss are averaged."""
_PACE_S, _MOST_STEPS = 5.0, 100
"""The pace of a rank is that of the window or, where steps are short, of so many seconds, in so many steps at most: a
few milliseconds are noise."""
_TAIL = 4 * _MOST_STEPS
"""Last events of a rank that suffice for its state: their counters run since the ranks were started."""


class Columns:
    """One entry per step, ascending; a missing value is 0, or NaN where 0 would be a valid value."""

    def __init__(self) -> None:
        self.step, self.tokens, self.padding = array("q"), array("q"), array("q")
        self.loss, self.learning_rate, self.gradient_norm = array("d"), array("d"), array("d")
        self.seconds, self.data_s, self.busy_s, self.update_s = array("d"), array("d"), array("d"), array("d")
        self.time = array("d")

    def __len__(self) -> int:
        return len(self.step)

    def cut(self, length: int) -> None:
        """Forget everything after this many steps."""
        for column in vars(self).values():
            del column[length:]


class Stretch(NamedTuple):
    """One launch, from the start of the ranks to their last event before the next."""

    began: float
    ended: float
    started: bool
    """False while the backbone is loaded."""


class Restart(NamedTuple):
    """The ranks began to train at `step`, after `reached` steps had been done before."""

    time: float
    reached: int
    step: int
    repeated_s: float
    """Seconds of the steps that have to be done again."""


class RankFold:
    """History of one rank, from its events."""

    def __init__(self) -> None:
        self.memory_bytes = 0
        """Peak bytes since the run was last started."""
        self.last_time, self.last_step = 0.0, 0
        self.finished = False
        self.recent: deque[tuple[int, float]] = deque(maxlen=_MOST_STEPS)
        """(own tokens, busy seconds) of the last steps since the run was last started."""

    def note(self, event: Event) -> None:
        """Add this rank's next event."""
        if event.kind in ("start", "resume"):
            self.memory_bytes = 0
            self.recent.clear()
        self.memory_bytes = max(self.memory_bytes, event.memory_bytes)
        self.last_time, self.last_step, self.finished = event.time, event.step, event.kind == "end"
        if event.busy_s:
            self.recent.append((event.own_tokens, event.busy_s))

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens/s of its own micro-batches while busy with them: median of the last steps."""
        speeds = [tokens / seconds for tokens, seconds in self._pace if seconds > 0]
        return median(speeds) if speeds else None

    @property
    def busy_s(self) -> float | None:
        """Busy seconds per step: median of the last steps."""
        return median(seconds for _, seconds in self._pace) if self.recent else None

    @property
    def _pace(self) -> list[tuple[int, float]]:
        taken = 0.0
        steps: list[tuple[int, float]] = []
        for step in reversed(self.recent):
            if len(steps) >= _WINDOW and taken >= _PACE_S:
                break
            steps.append(step)
            taken += step[1]
        return steps


class RunHistory:
    """A run so far. `add` takes events as they come; the order between ranks does not matter."""

    def __init__(self, *, total_steps: int = 0) -> None:
        self.restart(total_steps)

    def restart(self, total_steps: int = 0) -> None:
        """Forget everything: another run has taken the place of this one."""
        self.step, self.total_steps, self.finished = 0, total_steps, False
        self.columns = Columns()
        self.held_out: list[tuple[int, float]] = []
        """(step, loss) of each evaluation."""
        self.tasks: dict[str, list[tuple[int, float]]] = {}
        """(step, figure) of each evaluation, by task."""
        self.rising: set[str] = set()
        """Tasks of whose figure more is better."""
        self.ended_early = ""
        """Why the run ended before its last step, as a sentence; empty if it did not."""
        self.skipped: list[int] = []
        """Steps whose update was not made."""
        self.checkpoints: list[tuple[int, float]] = []
        """(step, seconds since the epoch) of each checkpoint."""
        self.resumed: list[tuple[int, float]] = []
        """(step, seconds since the epoch) of each resume."""
        self.restarts: list[Restart] = []
        """Every start of the ranks, the first one too."""
        self.inventory, self.gradients = "", ""
        """Lines of what is trained on, counted before the first step; and what was found of the gradients."""
        self.notes: list[tuple[int, str]] = []
        """(step, note of rank 0)."""
        self.stretches: list[Stretch] = []
        self.ranks: dict[int, RankFold] = {}
        self.unread = ""
        """What could not be read from the events, as a sentence; empty if everything could."""
        self._since = 0
        """Number of column entries from earlier stretches."""

    def add(self, events: Sequence[Event]) -> None:
        """Add events, each rank's in its own order."""
        by_rank: dict[int, list[Event]] = {}
        for event in events:
            by_rank.setdefault(event.rank, []).append(event)
        for rank, own in by_rank.items():
            self.add_of_rank(rank, own)

    def add_of_rank(self, rank: int, events: Sequence[Event]) -> None:
        """Add events of one rank, in its own order: faster for many."""
        known = self.ranks.setdefault(rank, RankFold())
        turns = (event for event in events[:-_TAIL] if event.kind in ("start", "resume"))
        for event in chain(turns, events[-_TAIL:]):
            known.note(event)
        if rank == 0:
            for is_step, group in groupby(events, key=_is_step):
                if is_step:
                    self._steps(list(group))
                else:
                    for event in group:
                        self._note(event)

    def _note(self, event: Event) -> None:
        if event.total_steps:
            self.total_steps = event.total_steps
        if event.kind in ("start", "resume"):
            self._go_back(event)
        elif event.kind == "load":
            self.stretches.append(Stretch(event.time - event.seconds, event.time, False))
        elif event.kind == "eval" and event.held_out_loss is not None:
            self.held_out = [point for point in self.held_out if point[0] != event.step]
            self.held_out.append((event.step, event.held_out_loss))
        elif event.kind == "eval" and event.figure is not None:
            points = [point for point in self.tasks.get(event.task, ()) if point[0] != event.step]
            self.tasks[event.task] = [*points, (event.step, event.figure)]
            self.rising |= {event.task} if event.rises else set()
        elif event.kind == "checkpoint":
            self.checkpoints.append((event.step, event.time))
        elif event.kind == "end":
            self.finished, self.ended_early = True, event.note
        elif event.kind == "inventory":
            self.inventory = event.note
        elif event.kind == "gradients":
            self.gradients = event.note
        if event.note and event.kind not in ("inventory", "gradients", "starting"):
            self.notes.append((event.step, event.note))
        self.step = max(self.step, event.step)
        self._lengthen(event.time)

    def _steps(self, events: list[Event]) -> None:
        """Add consecutive steps, a column at a time."""
        columns = self.columns
        if columns.step and events[0].step <= columns.step[-1]:
            columns.cut(bisect_left(columns.step, events[0].step))
        columns.step.extend([event.step for event in events])
        columns.tokens.extend([event.tokens for event in events])
        columns.padding.extend([event.padding for event in events])
        columns.loss.extend([math.nan if event.loss is None else event.loss for event in events])
        rates = [math.nan if event.learning_rate is None else event.learning_rate for event in events]
        columns.learning_rate.extend(rates)
        norms = [math.nan if event.gradient_norm is None else event.gradient_norm for event in events]
        columns.gradient_norm.extend(norms)
        columns.seconds.extend([event.seconds for event in events])
        columns.data_s.extend([event.data_s for event in events])
        columns.busy_s.extend([event.busy_s for event in events])
        columns.update_s.extend([event.update_s for event in events])
        columns.time.extend([event.time for event in events])
        self.skipped += [event.step for event in events if event.skipped]
        self.step = max(self.step, events[-1].step)
        self.total_steps = events[-1].total_steps or self.total_steps
        self._lengthen(events[-1].time)

    def _go_back(self, event: Event) -> None:
        kept = bisect_right(self.columns.step, event.step)
        self.restarts.append(Restart(event.time, self.step, event.step, sum(self.columns.seconds[kept:])))
        self.step, self.finished, self.ended_early = event.step, False, ""
        self.columns.cut(kept)
        self._since = len(self.columns)
        self.held_out = [point for point in self.held_out if point[0] <= event.step]
        self.tasks = {
            task: [point for point in points if point[0] <= event.step] for task, points in self.tasks.items()
        }
        self.skipped = [step for step in self.skipped if step <= event.step]
        self.checkpoints = [point for point in self.checkpoints if point[0] <= event.step]
        if event.kind == "resume":
            self.resumed.append((event.step, event.time))
        if not self.stretches or self.stretches[-1].started:
            self.stretches.append(Stretch(event.time, event.time, False))
        self.stretches[-1] = self.stretches[-1]._replace(started=True)

    def _lengthen(self, time: float) -> None:
        if self.stretches and time > self.stretches[-1].ended:
            self.stretches[-1] = self.stretches[-1]._replace(ended=time)

    @property
    def present(self) -> dict[int, RankFold]:
        """Ranks with events since the last launch: an earlier one may have had more."""
        since = self.stretches[-1].began if self.stretches else -math.inf
        return {number: rank for number, rank in self.ranks.items() if rank.last_time >= since}

    @property
    def trained_s(self) -> float:
        """Seconds that ranks were running, all launches together."""
        return sum(stretch.ended - stretch.began for stretch in self.stretches)

    @property
    def repeated_s(self) -> float:
        """Seconds of steps that were done again after a restart, all launches together."""
        return sum(restart.repeated_s for restart in self.restarts)

    def step_reached(self, time: float) -> int:
        """The step at which work was broken off at some time, or soon after it: seconds since the epoch."""
        return next((restart.reached for restart in self.restarts if restart.time >= time), self.step)

    @property
    def loss(self) -> float | None:
        """Loss of the last step."""
        return self.columns.loss[-1] if len(self.columns) else None

    @property
    def smoothed_loss(self) -> float | None:
        """Mean loss of the last steps, NaN and infinity left out."""
        finite = [loss for loss in self.columns.loss[-_WINDOW:] if math.isfinite(loss)]
        return fmean(finite) if finite else None

    @property
    def learning_rate(self) -> float | None:
        return _said(self.columns.learning_rate)

    @property
    def gradient_norm(self) -> float | None:
        return _said(self.columns.gradient_norm)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens/s without padding: median of the last steps, so that one checkpoint or compilation does not show."""
        return self._speed_of(self.columns.tokens[self._recent :])

    @property
    def positions_per_s(self) -> float | None:
        """The same for all positions, padding included."""
        columns, start = self.columns, self._recent
        return self._speed_of(list(map(add, columns.tokens[start:], columns.padding[start:])))

    def _speed_of(self, counts: Sequence[int]) -> float | None:
        """Median count a second of the last steps."""
        pairs = zip(counts, self.columns.seconds[self._recent :], strict=True)
        speeds = [count / seconds for count, seconds in pairs if seconds > 0]
        return median(speeds) if speeds else None

    @property
    def mean_tokens_per_s(self) -> float | None:
        """Tokens/s over all steps."""
        seconds = sum(self.columns.seconds)
        return sum(self.columns.tokens) / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step, at the median pace of the last steps and the mean pause between steps so far."""
        if self.finished:
            return 0.0
        recent = [seconds for seconds in self.columns.seconds[self._recent :] if seconds > 0]
        if not recent or not self.total_steps:
            return None
        return max(0, self.total_steps - self.step) * (median(recent) + self._pause_s)

    @property
    def padding_share(self) -> float | None:
        """Share of all computed positions that held no token."""
        padding, tokens = sum(self.columns.padding), sum(self.columns.tokens)
        return padding / (padding + tokens) if padding + tokens else None

    @property
    def data_share(self) -> float | None:
        """Share of the last steps' time that rank 0 spent on making samples."""
        start = self._recent
        seconds = sum(self.columns.seconds[start:])
        return sum(self.columns.data_s[start:]) / seconds if seconds > 0 else None

    @property
    def skew(self) -> tuple[int, float] | None:
        """(slowest rank, how much longer its passes take than the fastest's, as a share); None for one rank."""
        busy = {number: rank.busy_s for number, rank in self.present.items() if rank.busy_s}
        if len(busy) < 2:
            return None
        slowest = max(busy, key=lambda number: busy[number] or 0.0)
        fastest = min(seconds for seconds in busy.values() if seconds)
        return slowest, (busy[slowest] or 0.0) / fastest - 1

    @property
    def _pause_s(self) -> float:
        """Mean seconds between two steps for evaluations, checkpoints and the like since the run was last started."""
        columns, since = self.columns, self._since
        between = len(columns) - since - 1
        if between < 1:
            return 0.0
        whole = columns.time[-1] - columns.time[since]
        return max(0.0, whole - sum(columns.seconds[since + 1 :])) / between

    @property
    def _recent(self) -> int:
        """Index of the first of the last steps since the run was last started."""
        return max(self._since, len(self.columns) - _WINDOW)


def _said(column: "array[float]") -> float | None:
    return column[-1] if column else None


def _is_step(event: Event) -> bool:
    return event.kind == "step"
