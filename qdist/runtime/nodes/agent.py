"""One node's agent: `python -m qdist.runtime.nodes.agent`, with a NodeJob as a line of JSON on its standard input.

It meets the other nodes, agrees with them on a plan, runs this node's ranks, and begins again where a node is lost or
returns, until the run has ended. Further lines of its input: `stop` ends the run with a checkpoint, `end` at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec

from qdist.core.errors import QdistError, RunError
from qdist.core.nodes.job import LEFT, STILL_THERE, STOPPED, AgentLine, NodeJob
from qdist.core.telemetry.nodes import NodeEvent, NodeMember
from qdist.core.text import format_duration
from qdist.host.children import end_with_parent
from qdist.host.files import locked
from qdist.host.nodes.descriptors import allow_descriptors
from qdist.host.run.presence import agent_is_here, is_held, lock_of
from qdist.host.run.rundir import Ended, RunDir
from qdist.host.run.state import note
from qdist.runtime.nodes.agreeing import Agreed, Agreement, Memory, Waiting, require_fit
from qdist.runtime.nodes.board import Board, CutOff, Disrupted, Left, RunEnded
from qdist.runtime.nodes.folder import forget_old_stop, require_folder, unusable
from qdist.runtime.nodes.meeting import Meeting, endpoint_of, meet, own_place, reachable
from qdist.runtime.nodes.rounds import newcomers, rendezvous_of
from qdist.runtime.nodes.telling import Teller
from qdist.runtime.nodes.working import Outcome, Work, describe_start

_FIRST_CALL_S = 20.0
"""Seconds that a run which begins waits for more nodes once there are enough."""
_MEET_S = 15.0
"""Seconds within which nodes that are left have met again: torch takes 8 of them to forget one that is lost."""
_LOOK_S, _LOOK_ELSEWHERE_S = 0.2, 5.0
FAILED = 1


class Asked(Exception):
    """The user or a scheduler has asked to end the run while nothing of it worked."""


class Agent:
    """The agent of one node. lines: of its standard input after the job."""

    def __init__(self, job: NodeJob, lines: Any) -> None:
        self._job, self._run = job, RunDir(job.run)
        self._teller, self._memory = Teller(self._run), Memory()
        self._asked, self._began = 0, time.monotonic()
        self._leaving = False
        signal.signal(signal.SIGINT, self._ask)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._leave)
        threading.Thread(target=self._hear, args=(lines,), daemon=True, name="input").start()

    def work(self) -> int:
        """Take part to the end; the exit code."""
        try:
            require_folder(self._run.path)
            lock = lock_of(self._run, self._job.node)
            if is_held(lock):
                return STILL_THERE
            if not agent_is_here(self._run):
                forget_old_stop(self._run)
            with locked(lock, busy=f"an agent of {self._job.name} is at work in {self._run.path} already"):
                return self._ended_meetings()
        except (QdistError, OSError) as error:
            self._teller.writes = False  # the run is not this agent's yet
            return self._end(self._failed(error))

    def _ended_meetings(self) -> int:
        """Meet the others to the end; the exit code."""
        try:
            return self._meetings()
        except QdistError as error:
            # One that was not let in ends alone: it notes no end of a run that others are at work on here.
            self._teller.writes &= self._memory.active or not self._are_others_here()
            return self._end(self._failed(error))
        except (KeyboardInterrupt, Asked):
            return self._end(_stopped())
        except Left:
            self._teller.say(f"{self._job.name} leaves the run, as SIGTERM asked; {self._run.last_saved()}")
            return LEFT

    def _are_others_here(self) -> bool:
        """Whether agents of other nodes are at work in this run directory."""
        own = lock_of(self._run, self._job.node)
        return any(is_held(lock) for lock in self._run.path.glob("agent*.lock") if lock != own)

    def _meetings(self) -> int:
        """Meet the others, as often as it takes."""
        alone_since = time.monotonic()
        while True:
            before = self._memory.active
            may_serve = before or not self._job.resume or self._run.exists()
            with meet(
                self._job, before=before, may_serve=may_serve, check=self._check, say=self._teller.say
            ) as meeting:
                if not before:
                    require_fit(self._job, meeting)
                try:
                    return self._to_the_end(meeting, alone_since)
                except CutOff:
                    meeting.cut()
                    if self._is_finished():
                        return self._finish()
                    alone_since = time.monotonic()
                    self._tell_cut_off(meeting)

    def _tell_cut_off(self, meeting: Meeting) -> None:
        """Name the node that served the store: it is gone, or this one is cut off from it."""
        if meeting.serves or meeting.server_name == "":
            self._teller.say(f"{self._job.name} looks for the other nodes")
            return
        name, last = meeting.server_name, self._run.last_saved()
        self._teller.writes = True
        self._teller.event(
            NodeEvent(
                kind="lost", time=0.0, generation=self._memory.generation, node=meeting.server_node, name=name,
                seconds=meeting.beats.unreached_s(),
                note=f"{self._job.name} does not reach {name} any more: {name} is down or stopped, or the link is cut; "
                f"on {self._job.name} {last}",
            )
        )  # fmt: skip

    def _to_the_end(self, meeting: Meeting, since: float) -> int:
        """See the run to its end, and have the other nodes know it. Raises CutOff."""
        try:
            ended = self._generations(meeting, since)
        except RunEnded as told:
            ended = told.ended
        except (QdistError, OSError) as error:
            if not self._memory.active and meeting.is_at_work():
                raise  # one that was not let in ends alone
            ended = self._failed(error)
        except (KeyboardInterrupt, Asked):
            ended = _stopped()
        if ended is None:
            return self._finish()
        meeting.end(ended)
        return self._end(ended)

    def _generations(self, meeting: Meeting, since: float) -> Ended | None:
        """Generations of nodes that one store brings together; None once the run is finished."""
        rendezvous = rendezvous_of(self._job, meeting)
        while True:
            try:
                outcome = self._generation(meeting, rendezvous)
            except Disrupted:
                # Who is lost after the last step is not missed: without it the run would be planned with none left.
                outcome = "finished" if self._is_finished() else "again"
            except Waiting as reason:
                self._wait(meeting, rendezvous, str(reason), since)
                continue
            if outcome != "again":
                return None if outcome == "finished" else _stopped()
            since = time.monotonic()

    def _generation(self, meeting: Meeting, rendezvous: Any) -> Outcome:
        """Meet for a generation, agree, and work to its end. Raises Disrupted, Waiting, CutOff."""
        info = self._interruptible(meeting, rendezvous.next_rendezvous)
        meeting.beats.watch(())  # whoever is lost took no part in this rendezvous
        board = Board(info.store, lambda: self._look(meeting))
        if self._calls_again(meeting, board, rendezvous, there=info.world_size):
            return "again"
        agreement = Agreement(self._job, meeting, board, self._memory, place=info.rank, size=info.world_size)
        agreed = self._formed(agreement.reach(), meeting)
        work = Work(
            self._job, meeting, board, agreed, rendezvous, self._teller, lambda: self._asked, lambda: self._leaving
        )
        outcome = work.finish()
        if outcome == "again":  # who has left is not missed
            self._memory = self._memory._replace(members=work.stays)
        return outcome

    def _is_finished(self) -> bool:
        """Whether the run has its result: that of an earlier end is removed as a generation is written."""
        return self._memory.active and self._run.result() is not None

    def _finish(self) -> int:
        """Note that the run is finished; the exit code."""
        self._teller.event(NodeEvent(kind="finished", time=0.0, generation=self._memory.generation))
        self._teller.line(AgentLine(kind="ended"))
        return 0

    def _calls_again(self, meeting: Meeting, board: Board, rendezvous: Any, *, there: int) -> bool:
        """Whether more nodes have come while a run that is to begin waited for those that it may have."""
        if meeting.serves:
            until = self._began + (0.0 if self._memory.active else _FIRST_CALL_S)
            more = 0
            while there < self._job.most and not (more := newcomers(rendezvous)) and time.monotonic() < until:
                self._look(meeting)
                time.sleep(_LOOK_S)
            board.put("call", there < self._job.most and bool(more))
        return board.take("call", bool, limit_s=2 * _FIRST_CALL_S)

    def _formed(self, agreed: Agreed, meeting: Meeting) -> Agreed:
        """Note that a generation begins."""
        verdict = agreed.verdict
        self._memory = Memory(verdict.generation, verdict.members, active=True, prepared=agreed.prepared)
        self._teller.writes = agreed.leads
        if agreed.leads:
            own = msgspec.structs.replace(agreed.facts[self._job.node], run_id=verdict.run_id)
            meeting.begin(verdict.generation, own)
        members = tuple(
            NodeMember(
                node=node, name=agreed.facts[node].name, address=agreed.facts[node].address,
                ranks=tuple(rank.rank for rank in agreed.plan.ranks if rank.node == place),
            )
            for place, node in enumerate(verdict.members)
        )  # fmt: skip
        self._teller.line(AgentLine(kind="planned", generation=verdict.generation))
        self._teller.event(
            NodeEvent(
                kind="formed", time=0.0, generation=verdict.generation, step=verdict.step or 0, members=members,
                note=describe_start(agreed),
            )
        )  # fmt: skip
        return agreed

    def _wait(self, meeting: Meeting, rendezvous: Any, reason: str, since: float) -> None:
        """Wait for a node that is missing. Raises CutOff where there is a better place to wait, RunError in the end."""
        self._tell_of_waiting(reason)
        looked = time.monotonic()
        while newcomers(rendezvous) == 0:
            self._look(meeting, at_nodes=False)
            now = time.monotonic()
            if now - since > self._job.rejoin_s:
                raise self._too_late(reason)
            if meeting.serves and now - looked > _LOOK_ELSEWHERE_S:
                looked = now
                if _is_better_elsewhere(self._job, self._memory.generation):
                    raise CutOff
            if meeting.beats.silent():
                return
            time.sleep(_LOOK_S)

    def _tell_of_waiting(self, reason: str) -> None:
        note = f"waiting up to {format_duration(self._job.rejoin_s)} for the other nodes: {reason}"
        self._teller.event(NodeEvent(kind="waiting", time=0.0, generation=self._memory.generation, note=note))

    def _too_late(self, reason: str) -> RunError:
        return RunError(
            f"{self._job.name} waited {format_duration(self._job.rejoin_s)} for the other nodes: {reason}; "
            f"{self._run.last_saved()}",
            try_="start them again, and this run with --resume",
        )

    def _interruptible(self, meeting: Meeting, ask: Callable[[], Any]) -> Any:
        """What a call that may take long gives, unless the run is to end meanwhile or the store goes away."""
        from torch.distributed.elastic.rendezvous import (
            RendezvousConnectionError,
            RendezvousStateError,
            RendezvousTimeoutError,
        )

        waiting, needed = ThreadPoolExecutor(1).submit(ask), f"{self._job.least} of {self._job.most} nodes are needed"
        began = looked = time.monotonic()
        told = not self._memory.active
        while True:
            with suppress(TimeoutError):
                try:
                    return waiting.result(_LOOK_S)
                except (RuntimeError, RendezvousConnectionError, RendezvousStateError) as error:
                    raise CutOff(str(error)) from error  # the store is gone
                except RendezvousTimeoutError:
                    raise self._too_late(needed) from None
            self._look(meeting, at_nodes=False)
            if not told and time.monotonic() - began > _MEET_S:
                told = True
                self._tell_of_waiting(needed)
            if meeting.serves and time.monotonic() - looked > _LOOK_ELSEWHERE_S:
                looked = time.monotonic()
                if _is_better_elsewhere(self._job, self._memory.generation):
                    raise CutOff

    def _look(self, meeting: Meeting, *, at_nodes: bool = True) -> None:
        """While others are waited for: end with the run, or with a node that is lost."""
        if meeting.beats.cut_off:
            raise CutOff
        self._check()
        try:
            ended = meeting.ended()
        except RuntimeError as error:
            raise CutOff(str(error)) from error
        if ended is not None:
            raise RunEnded(ended)
        if at_nodes and meeting.beats.silent():
            raise Disrupted

    def _check(self) -> None:
        if self._leaving:
            raise Left
        if self._asked or self._run.stop_requested():
            raise Asked

    def _leave(self, *_: int | FrameType | None) -> None:
        self._leaving = True

    def _ask(self, *_: int | FrameType | None) -> None:
        self._asked += 1

    def _hear(self, lines: Any) -> None:
        for line in lines:
            if word := {b"stop": 1, b"end": 2}.get(line.strip()):
                self._asked = max(self._asked, word)

    def _failed(self, error: QdistError | OSError) -> Ended:
        if isinstance(error, OSError):
            error = unusable(self._job.name, self._run.path, error)
        return Ended(state="failed", message=error.message, try_=error.try_, time=time.time())

    def _end(self, ended: Ended) -> int:
        """Note how the run ended before its last step; the exit code."""
        if self._run.exists() and (self._teller.writes or self._run.ended() is None):
            note(self._run, ended)  # on a disk of its own too, where otherwise the run would look killed
        if self._teller.writes and self._run.exists():
            event = NodeEvent(kind=ended.state, time=0.0, generation=self._memory.generation, note=ended.message)
            self._teller.event(event)
        if ended.state == "stopped":
            return STOPPED
        self._teller.line(AgentLine(kind="error", text=ended.message, try_=ended.try_))
        return FAILED


def _stopped() -> Ended:
    return Ended(state="stopped", time=time.time())


def _is_better_elsewhere(job: NodeJob, generation: int) -> bool:
    """Whether another node serves a store where the run is at work, or is to be waited for rather than here."""
    own = own_place(job)
    found = reachable(job, own)
    if found is None:
        return False
    place = [endpoint_of(text) for text in job.endpoints].index(found)
    return own is None or place < own or _generation_at(job, found) > generation


def _generation_at(job: NodeJob, server: tuple[str, int]) -> int:
    """The generation that works in another node's store; 0 if none does."""
    with suppress(RuntimeError, OSError, QdistError), Meeting(job, server, say=lambda _: None) as other:
        return other.generation()
    return 0


def main() -> None:
    """Read the job, take part in the run, and exit as `qdist.core.nodes.job` says."""
    # Unbuffered: a thread that waits in a buffered reader would end the interpreter with an error.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lines:
        job = msgspec.json.decode(lines.readline(), type=NodeJob)
        if job.attached:
            end_with_parent(os.getppid(), signal.SIGKILL)
        allow_descriptors()
        code = Agent(job, lines).work()
        # Threads of a store that nobody serves any more would hold the process.
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
