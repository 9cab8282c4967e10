"""The ranks of a run as processes: their last beats, and what the kernel says of those that are on this machine."""

import os
import socket
from pathlib import Path
from typing import Literal

from qdist.core.errors import RunError
from qdist.core.pulse import Pulse
from qdist.host.opening import read_typed
from qdist.host.rundir import RunDir, of_ranks

Process = Literal["runs", "stopped", "gone", "elsewhere"]


def read_pulses(run: RunDir) -> dict[int, Pulse]:
    """The last beat of each rank that has one. A beat that was torn by a kill is left out."""
    found = {}
    for path in of_ranks(run.pulses, ".json"):
        try:
            pulse = read_typed(path, Pulse, RunError)
        except RunError:
            continue
        found[pulse.rank] = pulse
    return found


def process_of(pulse: Pulse, *, proc: Path = Path("/proc")) -> Process:
    """How the rank's process is: stopped by a signal or a debugger; gone; or on another machine, where nobody knows."""
    if pulse.host != socket.gethostname():
        return "elsewhere"
    stat = stat_of(pulse.pid, proc=proc)
    return "gone" if stat is None else "stopped" if stat[0] in "Tt" else "runs"


def stat_of(pid: int, *, proc: Path = Path("/proc")) -> list[str] | None:
    """What the kernel says of a process, from its state on (proc(5), /proc/pid/stat); None where it is gone."""
    try:
        # The name, in parentheses, may hold anything; the state follows the last of them.
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if not fields or fields[0] in "ZX" else fields


def environment_of(pulse: Pulse, *, proc: Path = Path("/proc")) -> dict[str, str]:
    """What the rank's process was started with; empty where it is gone or another user's."""
    try:
        entries = os.fsdecode((proc / str(pulse.pid) / "environ").read_bytes()).split("\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}


def signalled(pulse: Pulse, number: int) -> bool:
    """Send a signal to a rank's process; whether there was one to take it."""
    try:
        os.kill(pulse.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
