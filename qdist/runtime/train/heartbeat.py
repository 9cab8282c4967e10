"""A rank's heartbeat: a thread that reports every second what the rank is doing, and its stacks on request.

The thread goes on while the rank waits in a collective; it stops when the process does. So silence says that the
process is stopped or gone, and a beat whose `moved` stays says that it waits.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from qdist.core.machine.environment import LAUNCH
from qdist.core.telemetry.heartbeat import Heartbeat, Phase, encode
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import is_anothers
from qdist.host.terminal import say

BEAT_S = 1.0


class HeartbeatThread:
    """This rank's current activity. Updating it sets a few attributes; a thread writes them to disk.

    memory_now: bytes, asked for at each beat from that thread.
    """

    def __init__(self, run: RunDir, rank: int, *, memory_now: Callable[[], int] = lambda: 0) -> None:
        run.pulses.mkdir(exist_ok=True)
        run.stacks.mkdir(exist_ok=True)
        self._run, self._path, self._rank, self._host = run, run.pulse_file(rank), rank, socket.gethostname()
        self._launch = os.environ.get(LAUNCH, "")
        self.memory_now = memory_now
        self._now: tuple[Phase, int, int, int] = ("starting", 0, 0, 0)
        self._moved = time.time()
        self._stacks = open(run.stack_file(rank), "wb", buffering=0)  # noqa: SIM115  (open until the process ends)
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._write()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="beat")
        self._thread.start()

    def move(self, phase: Phase, step: int = 0, micro_batch: int = 0, micro_batches: int = 0) -> None:
        """Set the rank's current activity."""
        self._now, self._moved = (phase, step, micro_batch, micro_batches), time.time()

    def end(self) -> None:
        """Write the last heartbeat."""
        self.move("ended", self._now[1])
        self._ended.set()
        self._thread.join()
        self._tell()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if self._launch and is_anothers(self._run, self._launch):
                say("error: another launch goes on with this run: this rank of an earlier one ends")
                os._exit(1)  # what waits in a collective would wait for ever
            self._tell()

    def _tell(self) -> None:
        """Write a heartbeat, or skip it if the disk is full: a thread that died would silence the rank for good."""
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        phase, step, micro_batch, micro_batches = self._now
        pulse = Heartbeat(
            rank=self._rank,
            pid=os.getpid(),
            host=self._host,
            launch=self._launch,
            time=time.time(),
            phase=phase,
            moved=self._moved,
            step=step,
            micro_batch=micro_batch,
            micro_batches=micro_batches,
            memory_bytes=self.memory_now(),
        )
        beside = self._path.with_suffix(".new")
        beside.write_bytes(encode(pulse))
        os.replace(beside, self._path)


class Move(Protocol):
    """Sets what a rank is doing: `HeartbeatThread.move`, or `silent`."""

    def __call__(self, phase: Phase, step: int = 0, micro_batch: int = 0, micro_batches: int = 0) -> None: ...


def silent(phase: Phase, step: int = 0, micro_batch: int = 0, micro_batches: int = 0) -> None:
    """The default of a trainer without a heartbeat: does nothing."""
