"""The processes of a run's ranks: their last heartbeats, their state in the kernel, and whether one is stuck."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from qdist.core.errors import RunError
from qdist.core.telemetry.heartbeat import UNMEASURED, Heartbeat
from qdist.core.text import format_duration
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir, of_ranks

Process = Literal["runs", "stopped", "gone", "elsewhere"]


def read_pulses(run: RunDir) -> dict[int, Heartbeat]:
    """The last heartbeat of each rank that has one; heartbeats torn by a kill are skipped."""
    found = {}
    for path in of_ranks(run.pulses, ".json"):
        try:
            pulse = read_typed(path, Heartbeat, RunError)
        except RunError:
            continue
        found[pulse.rank] = pulse
    return found


class PulseReader:
    """Reads a run's heartbeats, with their times by the clock of this machine.

    Clocks of nodes differ. A rank elsewhere was last heard of when its heartbeat was seen to change; at the first look,
    when its file was written.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._heard: dict[int, tuple[float, float]] = {}
        """By rank: the time in its last heartbeat, and when that was heard here."""

    def read(self, now: float) -> dict[int, Heartbeat]:
        """The last heartbeat of each rank that has one. now: seconds since the epoch."""
        here = socket.gethostname()
        pulses = read_pulses(self._run)
        return {rank: pulse if pulse.host == here else self._as_heard(pulse, now) for rank, pulse in pulses.items()}

    def _as_heard(self, pulse: Heartbeat, now: float) -> Heartbeat:
        before = self._heard.get(pulse.rank)
        if before is None:
            heard = min(now, self._written(pulse.rank, now))
        else:
            heard = before[1] if before[0] == pulse.time else now
        self._heard[pulse.rank] = pulse.time, heard
        return msgspec.structs.replace(pulse, time=heard, moved=heard - (pulse.time - pulse.moved))

    def _written(self, rank: int, otherwise: float) -> float:
        with contextlib.suppress(FileNotFoundError):
            return self._run.pulse_file(rank).stat().st_mtime
        return otherwise


def process_of(pulse: Heartbeat, *, proc: Path = Path("/proc")) -> Process:
    """State of a rank's process: stopped by a signal or debugger, gone, or unknown because on another machine."""
    if pulse.host != socket.gethostname():
        return "elsewhere"
    stat = stat_of(pulse.pid, proc=proc)
    return "gone" if stat is None else "stopped" if stat[0] in "Tt" else "runs"


def stat_of(pid: int, *, proc: Path = Path("/proc")) -> list[str] | None:
    """The kernel's fields for a process, from its state on (proc(5), /proc/pid/stat); None if it is gone."""
    try:
        # The name, in parentheses, may hold anything; the state follows the last of them.
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if not fields or fields[0] in "ZX" else fields


def environment_of(pulse: Heartbeat, *, proc: Path = Path("/proc")) -> dict[str, str]:
    """The environment a rank's process was started with; empty if it is gone or another user's."""
    try:
        entries = os.fsdecode((proc / str(pulse.pid) / "environ").read_bytes()).split("\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}


def signalled(pulse: Heartbeat, number: int) -> bool:
    """Send a signal to a rank's process; whether it could be delivered."""
    try:
        os.kill(pulse.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


SILENT_S = 10.0
"""Seconds without a heartbeat, normally one per second, after which a process is stopped, gone or starved."""
_STACKS_S = 5.0
_START_S = 120.0
"""Minimum seconds to wait for the first heartbeat: torch is imported first, perhaps from a network disk."""


class Trouble(NamedTuple):
    """A rank that makes no progress."""

    rank: int
    seconds: float
    silent: bool
    """Whether it sends no heartbeats; otherwise it is alive and waits."""
    process: Process
    pulse: Heartbeat

    def __str__(self) -> str:
        """'rank 1 has been silent for 31 s: its process is stopped, last seen in forward and ...'."""
        for_how_long = format_duration(self.seconds)
        if not self.silent:
            return f"rank {self.rank} has not moved for {for_how_long}: it is {self.pulse}"
        how = {
            "stopped": "its process is stopped (by a signal or a debugger)",
            "gone": "its process is gone",
            "runs": "its process runs but does not get to say so",
            "elsewhere": f"it was on {self.pulse.host}",
        }[self.process]
        return f"rank {self.rank} has been silent for {for_how_long}: {how}, last seen {self.pulse}"


def troubles(pulses: Mapping[int, Heartbeat], *, now: float, after_s: float, since: float = 0.0) -> list[Trouble]:
    """Ranks that have been silent, or have not moved, for `after_s` seconds; the likely culprits first.

    A rank that waits in a collective does not move either, so the silent come before the waiting, and among these the
    one that stands still at the earliest place: the others wait for it.

    since: when the time that counts began.
    """
    found = []
    for pulse in pulses.values():
        if pulse.phase == "ended":
            continue
        silent_s, still_s = now - max(since, pulse.time), now - max(since, pulse.moved)
        if silent_s >= after_s:
            found.append(Trouble(pulse.rank, silent_s, True, process_of(pulse), pulse))
        elif still_s >= after_s and pulse.phase not in UNMEASURED:
            found.append(Trouble(pulse.rank, still_s, False, process_of(pulse), pulse))
    return sorted(
        found,
        key=lambda one: (
            not one.silent, one.process == "runs", one.pulse.step, one.pulse.micro_batch, one.pulse.moved
        ),
    )  # fmt: skip


def collect_stacks(run: RunDir, pulses: Mapping[int, Heartbeat]) -> list[int]:
    """Have every rank on this machine write its threads' stacks to RUN/stacks; the ranks that did.

    A stopped one is woken for it: it is to be ended anyway.
    """
    here = [pulse for pulse in pulses.values() if process_of(pulse) in ("runs", "stopped")]
    before = {pulse.rank: _size(run, pulse.rank) for pulse in here}
    for pulse in here:
        if signalled(pulse, signal.SIGUSR1) and process_of(pulse) == "stopped":
            signalled(pulse, signal.SIGCONT)
    end, sizes = time.monotonic() + _STACKS_S, dict[int, int]()
    while time.monotonic() < end:
        last, sizes = sizes, {rank: _size(run, rank) for rank in before}
        # A thread after the other is written: all are there once nothing more comes.
        if sizes == last and all(sizes[rank] > size for rank, size in before.items()):
            break
        time.sleep(0.2)
    return sorted(rank for rank, size in before.items() if _size(run, rank) > size)


def _size(run: RunDir, rank: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(run.stack_file(rank)).st_size
    return 0


class Watchdog:
    """Watches the ranks' heartbeats from now on.

    after_s: how long one may stand still, or give no beat at all; 0 for ever.
    ranks: how many there are to be.
    launch: whose beats count: those of an earlier launch are no word of this one.
    """

    def __init__(self, run: RunDir, after_s: float, *, ranks: int, launch: str) -> None:
        self._run, self._after_s, self._ranks, self._launch = run, after_s, frozenset(range(ranks)), launch
        self._reader = PulseReader(run)
        self._awake, self._last = time.time(), 0.0

    def stuck(self) -> str:
        """A sentence about the rank to blame, with stacks written; empty while all make progress."""
        now = time.time()
        if not self._after_s or now - self._last < 1.0:
            return ""
        if self._last and now - self._last > SILENT_S:
            # It was away itself, with a suspended job or machine: the ranks may have been as well.
            self._awake = now
        self._last = now
        pulses = {rank: pulse for rank, pulse in self._reader.read(now).items() if pulse.launch == self._launch}
        if (never := sorted(self._ranks - pulses.keys())) and now - self._awake >= max(self._after_s, _START_S):
            return f"{_ranks(never)} gave no sign of life within {format_duration(now - self._awake)} of the start"
        found = troubles(pulses, now=now, after_s=self._after_s, since=self._awake)
        if not found:
            return ""
        wrote = collect_stacks(self._run, pulses)
        still = troubles(pulses, now=now, after_s=self._after_s / 2, since=self._awake)
        others = sorted(one.rank for one in still if one.rank != found[0].rank)
        stand = "stands still" if len(others) == 1 else "stand still"
        waiting = f"; {_ranks(others)} {stand} as well" if others else ""
        stacks = f"; stacks of rank {', '.join(map(str, wrote))} are in {self._run.stacks}" if wrote else ""
        return f"{found[0]}{waiting}{stacks}"


def _ranks(numbers: list[int]) -> str:
    """'rank 3', or 'ranks 0, 1'."""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
