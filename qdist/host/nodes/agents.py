"""The agents of a run's nodes as one thing that is started, heard, stopped and killed; lost ones are started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

import msgspec

from qdist.core.errors import JobError, QdistError
from qdist.core.nodes.job import LEFT, STILL_THERE, STOPPED, AgentLine, NodeJob
from qdist.host import children
from qdist.host.run.rundir import STOP, RunDir
from qdist.host.run.state import find_reason

AGENT = "qdist.runtime.nodes.agent"
UNREACHED = 255
"""Exit code of ssh when a host could not be reached, or its connection ended."""
_AGAIN_S = 5.0
"""Seconds between two attempts to start the agent of a host that was lost."""
_ALONE_S = 5.0
"""Seconds that a failed agent waits for the others to fail with it, before it is said that it failed alone."""
_GRACE_S = 60.0
"""Seconds that agents get to end once another has ended the run: they copy its last files."""
_UNBEGUN_S = 5.0
"""The same before there is a plan: no host has files to copy, and those that wait for the others wait in vain."""
_KILL_S = 15.0
"""Seconds that a host gets to have its agent killed."""
_TAIL_BYTES = 1 << 14
_TICK_S = 0.05


class Place(Protocol):
    """Where an agent runs: this machine, or a host over ssh."""

    here: bool
    """Whether it is this machine."""

    def start(self, job: NodeJob, errors: int, before: int | None) -> "subprocess.Popen[bytes]":
        """Start an agent, with its job on its standard input.

        errors: descriptor of what its standard error goes to. before: process id there of the agent before.
        """

    def kill(self, process: "subprocess.Popen[bytes] | None", there: int | None) -> "subprocess.Popen[bytes] | None":
        """Kill an agent and its ranks without waiting; what does it, if that takes a moment.

        process: what was started here. there: process id of the agent there.
        """

    def explain(self, code: int, errors: Sequence[str]) -> QdistError:
        """Why an agent ended that said nothing itself. errors: last lines of its standard error."""


class Here:
    """This machine: the agent ends with this process."""

    here = True

    def __init__(self, name: str, *, module: str = AGENT) -> None:
        self._name, self._module = name, module

    def start(self, job: NodeJob, errors: int, before: int | None) -> "subprocess.Popen[bytes]":
        """Start an agent in a session of its own."""
        return started(
            [sys.executable, "-u", "-P", "-m", self._module], job, errors,
            environment=children.environment(), begin=children.ending_with_this(),
        )  # fmt: skip

    def kill(self, process: "subprocess.Popen[bytes] | None", there: int | None) -> None:
        """Kill the agent; its ranks end with it."""
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def explain(self, code: int, errors: Sequence[str]) -> QdistError:
        """The signal that ended it, or the reason in its last lines."""
        if code == STILL_THERE:
            return JobError(
                f"{self._name} has the number of an agent that is at work in the run directory: another node's, or one "
                "of an earlier launch",
                try_="another --node-rank, or qdist stop of that run",
            )
        how = children.killed_by(-code) if code < 0 else f"ended with exit code {code}"
        why = find_reason(errors)
        return JobError(f"the agent of {self._name} {how}" + (f": {why}" if why else ""), try_="the same command again")


def started(
    command: Sequence[str],
    job: NodeJob,
    errors: int,
    *,
    environment: dict[str, str] | None = None,
    begin: Callable[[], None] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a program in its own session and write a job to its standard input; its output can be read as it comes."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, preexec_fn=begin,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            stdin.write(msgspec.json.encode(job) + b"\n")
    except BrokenPipeError:  # it has ended: its exit code says more
        pass
    os.set_blocking(process.stdout.fileno(), False)
    return process


class Agent:
    """One node's agent, and what it has said."""

    def __init__(self, job: NodeJob, place: Place) -> None:
        self.job, self.place, self.name = job, place, job.name
        self.code: int | None = None
        """How it ended; None while it runs."""
        self.generation = 0
        """The last generation of which it said that it is planned."""
        self.error: QdistError | None = None
        """Why it failed."""
        self.ended_at = 0.0
        """When it was found to have ended, by the monotonic clock."""
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = -1
        self._files = ExitStack()
        self._there: int | None = None
        self._half = b""

    @property
    def is_lost(self) -> bool:
        """Whether it ended without a word of how the run ended: killed, or its connection broken."""
        return self.code is not None and (self.code < 0 or self.code in (UNREACHED, STILL_THERE))

    def start(self) -> None:
        """Start it, or start it again: then it joins the run as that is by then."""
        job = self.job if not self.generation else msgspec.structs.replace(self.job, resume=True, settings={})
        self._files.close()
        self._errors = os.memfd_create("errors")
        self._files.callback(os.close, self._errors)
        self._half, self.error = b"", None
        self._process, self.code = self.place.start(job, self._errors, self._there), None
        if self._process.stdout is not None:
            self._files.callback(self._process.stdout.close)

    def poll(self) -> list[AgentLine]:
        """What it said since the last call; sets `code` once it has ended."""
        process = self._process
        if process is None or self.code is not None:
            return []
        code = process.poll()
        lines = self._read()
        if code is not None:
            self.code, self.ended_at = code, time.monotonic()
            if code not in (0, STOPPED, LEFT) and self.error is None and not self.is_lost:
                self.error = self.why()
        return lines

    def why(self) -> QdistError:
        """Why it ended, from what it left on its standard error."""
        assert self.code is not None
        return self.error or self.place.explain(self.code, self._last_errors())

    def terminate(self) -> None:
        """Send SIGTERM to it if it runs here."""
        if self.place.here and self._process is not None:
            self._process.terminate()

    def kill(self) -> "subprocess.Popen[bytes] | None":
        """Kill it and its ranks, wherever they are; what does it, if that takes a moment."""
        if self.code is not None and not self.is_lost:
            return None
        there, self._there = self._there, None
        return self.place.kill(self._process, there)

    def close(self) -> None:
        """Wait for what was started here, and forget its output."""
        if self._process is not None:
            self._process.wait()
        self._files.close()

    def _read(self) -> list[AgentLine]:
        assert self._process is not None
        assert self._process.stdout is not None
        *whole, self._half = (self._half + (self._process.stdout.read() or b"")).split(b"\n")
        found = [line for line in map(self._line, whole) if line is not None]
        for line in found:
            if line.kind == "planned":
                self.generation = line.generation
            elif line.kind == "error":
                self.error = JobError(line.text, try_=line.try_)
        return found

    def _line(self, raw: bytes) -> AgentLine | None:
        """A line of an agent; None for those of a login shell, and for the process id that the start tells."""
        if raw.startswith(b"qdist agent ") and raw.split()[-1].isdigit():
            self._there = int(raw.split()[-1])
            return None
        try:
            return msgspec.json.decode(raw, type=AgentLine)
        except msgspec.DecodeError:
            return None

    def _last_errors(self) -> list[str]:
        size = os.fstat(self._errors).st_size
        tail = os.pread(self._errors, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return tail.decode(errors="replace").splitlines()


class Agents:
    """The agents of a run, as `qdist.host.launch.ranks.Ranks` has its ranks. A context: none is left at its end."""

    def __init__(self, run: RunDir, agents: Sequence[Agent]) -> None:
        self._run, self._agents = run, tuple(agents)
        self._lines: list[str] = []
        self._told: set[tuple[str, int]] = set()
        self._killing: list[subprocess.Popen[bytes]] = []
        self._told_lost: set[str] = set()
        self._killed = False

    def __enter__(self) -> "Agents":
        for agent in self._agents:
            agent.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()
        for agent in self._agents:
            agent.close()

    @property
    def generation(self) -> int:
        """The last generation whose plan is in the run directory of this machine; 0 before the first."""
        return max((agent.generation for agent in self._agents if agent.place.here), default=0)

    @property
    def error(self) -> QdistError | None:
        """Why the run failed: what the first agent that failed says of it; None if none failed."""
        ended = sorted(self._agents, key=lambda agent: agent.ended_at)
        told = [agent.error for agent in ended if agent.error is not None]
        return told[0] if told else next((agent.why() for agent in ended if agent.is_lost), None)

    def new_lines(self) -> list[str]:
        """Lines for the user since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def poll(self) -> int | None:
        """Hear all agents and start lost ones again; the common exit code once all have ended."""
        for agent in self._agents:
            for line in agent.poll():
                self._told_lost.discard(agent.name)
                if line.kind == "say":
                    self._tell(line.text, line.generation, agent)
        running = [agent for agent in self._agents if agent.code is None]
        if not running:
            return self._code()
        if self._killed:
            return None
        if self._is_over():
            self._end_late()
        else:
            self._start_lost_again()
            self._tell_failures()
        return None

    def stop(self) -> None:
        """Ask the ranks to save and end: the agent of this machine sees the file and tells the others."""
        (self._run.path / STOP).touch()

    def leave(self) -> None:
        """Have this machine's agent leave the run to the others."""
        for agent in self._agents:
            agent.terminate()

    def kill(self) -> None:
        """Kill all agents and their ranks, on all hosts, without waiting."""
        # Also called in a signal handler, where waiting could wait for the code that was interrupted.
        self._killed = self._killed or any(agent.code is None for agent in self._agents)
        self._killing += [process for agent in self._agents if (process := agent.kill()) is not None]

    def wait(self) -> int:
        """The common exit code, once all agents have ended and those that were killed are gone."""
        while (code := self.poll()) is None:
            time.sleep(_TICK_S)
        deadline = time.monotonic() + _KILL_S
        while self._killing:
            process = self._killing.pop()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # such a host is out of reach: its agent ends by itself
                process.kill()
                process.wait()
        return code

    def _code(self) -> int:
        """0 if an agent finished the run, STOPPED if one stopped it; otherwise as the first failed one ended."""
        known = [agent.code for agent in self._agents if agent.code is not None]
        if 0 in known:
            return 0
        if STOPPED in known:
            return STOPPED
        failed = next((agent.code for agent in self._agents if agent.code and not agent.is_lost), None)
        return failed or (-signal.SIGKILL if self._killed else known[0])

    def _is_over(self) -> bool:
        """Whether an agent has ended the run for all: with its end, or with a failure before there was a plan."""
        codes = [agent.code for agent in self._agents if not agent.is_lost]
        return 0 in codes or STOPPED in codes or (1 in codes and not any(agent.generation for agent in self._agents))

    def _end_late(self) -> None:
        """Kill agents that have not ended in time after another has ended the run."""
        ended = min(agent.ended_at for agent in self._agents if agent.code is not None and not agent.is_lost)
        grace = _GRACE_S if any(agent.generation for agent in self._agents) else _UNBEGUN_S
        if time.monotonic() - ended > grace:
            self.kill()

    def _start_lost_again(self) -> None:
        for agent in filter(lambda agent: agent.is_lost, self._agents):
            if agent.name not in self._told_lost:
                self._told_lost.add(agent.name)
                self._lines.append(f"{agent.why().message.removesuffix('.')}; it is tried again every {_AGAIN_S:.0f} s")
            if time.monotonic() - agent.ended_at >= _AGAIN_S:
                agent.start()

    def _tell_failures(self) -> None:
        """Say of agents that failed while others go on why they did, once."""
        for agent in self._agents:
            alone = agent.error is not None and agent.code is not None and not agent.is_lost
            if alone and time.monotonic() - agent.ended_at > _ALONE_S:
                self._tell(f"ended: {agent.why()}", 0, agent)

    def _tell(self, text: str, generation: int, agent: Agent) -> None:
        """Keep a line for the user, once: agents are equal, and several may say the same."""
        if (text, generation) not in self._told:
            self._told.add((text, generation))
            self._lines.append(text if agent.place.here else f"{agent.name}: {text}")
