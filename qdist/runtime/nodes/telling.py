"""What an agent tells: lines to who started it, events to `RUN/nodes.jsonl`."""

import os
import sys
import time
from contextlib import suppress

import msgspec

from qdist.core.nodes.job import AgentLine
from qdist.core.telemetry.nodes import NodeEvent
from qdist.host.run.rundir import NODES, RunDir


class Teller:
    """Writes lines that nobody has to read: who started the agent may be gone."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self.writes = True
        """Whether events go to the run directory: those of a generation are its leader's to write."""

    def say(self, text: str) -> None:
        self.line(AgentLine(kind="say", text=text))

    def line(self, line: AgentLine) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
            sys.stdout.buffer.flush()

    def event(self, event: NodeEvent) -> None:
        """Append an event, and say its sentence."""
        if event.note:
            self.say(event.note)
        if not self.writes:
            return
        timed = msgspec.structs.replace(event, time=time.time())
        with suppress(OSError):
            descriptor = os.open(self._run.path / NODES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, msgspec.json.encode(timed) + b"\n")
            finally:
                os.close(descriptor)
