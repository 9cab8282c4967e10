"""One generation at work: this node's ranks from their start to the word that all nodes end it by."""

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from qdist.core.errors import JobError
from qdist.core.nodes.facts import Failure
from qdist.core.nodes.job import NodeJob
from qdist.core.telemetry.nodes import NodeEvent
from qdist.core.text import counted, listed
from qdist.host.files import write_atomic
from qdist.host.nodes.mirror import Mirror
from qdist.host.run.rundir import STOP, RunDir
from qdist.host.run.state import stuck
from qdist.host.run.watchdog import Watchdog
from qdist.runtime.nodes.agreeing import Agreed
from qdist.runtime.nodes.board import Board, CutOff, Disrupted, Left, RunEnded
from qdist.runtime.nodes.meeting import Meeting
from qdist.runtime.nodes.processes import OwnRanks
from qdist.runtime.nodes.rounds import newcomers
from qdist.runtime.nodes.telling import Teller

Outcome = Literal["finished", "stopped", "again", "failed"]
_LOOK_S, _NEWCOMERS_S = 0.2, 1.0
_BLAME_S = 14.0
"""Seconds until a failed rank is its own fault, and not that of a node that turns out to be lost."""
_OF_OTHERS = ("connection", "peer", "nccl", "gloo", "socket", "timed out", "broken pipe")
"""Words of errors of a rank that lost another one."""
_GOODBYE_S = 60.0
_LOST = "lost"
"""Key of the board for the nodes that are lost."""
_FAILED = "failed"
"""Key of the board that says that a node has failed, and how stands under its own."""


class Work:
    """The part of this node in a generation.

    asked: how often the user has asked to end the run: once to save first. leaving: whether this node was told to
    leave it, as by a scheduler that takes the machine back.
    """

    def __init__(
        self, job: NodeJob, meeting: Meeting, board: Board, agreed: Agreed, rendezvous: Any, teller: Teller,
        asked: Callable[[], int], leaving: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._job, self._meeting, self._board, self._agreed = job, meeting, board, agreed
        self._rendezvous, self._teller, self._asked, self._leaving = rendezvous, teller, asked, leaving
        self._run, self._failed_at, self._looked, self._yields = RunDir(job.run), 0.0, 0.0, False
        self.stays: tuple[int, ...] = agreed.verdict.members
        """Once the generation has ended, those of its nodes that were not told to leave."""
        self._watchdog: Watchdog | None = None
        if meeting.serves:  # the others' heartbeats come here
            plan = agreed.plan
            self._watchdog = Watchdog(self._run, plan.spec.train.stuck_seconds, ranks=plan.world_size, launch="")

    def finish(self) -> Outcome:
        """Work to the end of the generation; nothing of it runs any more then, however it ends.

        Raises Disrupted where a node is lost, CutOff where this one is, JobError where ranks fail, KeyboardInterrupt
        where all is to end at once.
        """
        agreed, job = self._agreed, self._job
        ranks = OwnRanks(
            agreed.plan, self._run, generation=agreed.verdict.generation,
            place=agreed.verdict.members.index(job.node), port=self._meeting.port, address=job.address,
            keeps=agreed.keeps, prepared=None if self._meeting.serves else self._prepared(),
        )  # fmt: skip
        mirror = None
        if self._meeting.files is not None and agreed.keeps:
            mirror = Mirror(self._run, self._meeting.files, ranks.ranks)
            mirror.start()
        try:
            self._attend(ranks)
            ranks.kill()
            return self._conclude(mirror)
        finally:
            ranks.kill()
            if mirror is not None:
                mirror.stop()
            if self._meeting.serves or agreed.keeps:
                (self._run.path / STOP).unlink(missing_ok=True)

    def _prepared(self) -> Path:
        """The file that tells ranks where model and data lie here: the plan says where they lie on the leader."""
        path = self._run.path / f"prepared{self._job.node:03d}.json"
        write_atomic(path, msgspec.json.encode(self._agreed.prepared))
        return path

    def _attend(self, ranks: OwnRanks) -> None:
        """Follow this node's ranks until they and all others have ended well."""
        said = False
        while True:
            self._look_at_others()
            self._pass_on_requests(ranks)
            if (error := ranks.failure()) is not None:
                if self._yields:  # before their first step, or with others that were
                    ranks.kill()
                    ranks.forget()
                    continue
                self._blame(error)
            elif ranks.ended():
                if not said:
                    self._board.put(f"done/{self._job.node}", True)
                    said = True
                if self._board.has(*(f"done/{node}" for node in self._agreed.verdict.members)):
                    return
            if not self._failed_at:
                self._hear_of_failures()
            if self._watchdog and (hung := self._watchdog.stuck()):
                raise stuck(self._run, hung)
            time.sleep(_LOOK_S)

    def _look_at_others(self) -> None:
        beats = self._meeting.beats
        if beats.cut_off:
            raise CutOff
        try:
            now, ended = self._meeting.generation(), self._meeting.ended()
        except RuntimeError as error:
            raise CutOff(str(error)) from error
        if ended is not None:
            raise RunEnded(ended)
        if now > self._agreed.verdict.generation:  # this node was stopped meanwhile, and others went on
            raise Disrupted
        if lost := self._lost():
            self._teller.writes = self._speaks_of(lost)
            for node, seconds in lost.items():
                name = self._agreed.facts[node].name
                self._teller.event(
                    NodeEvent(
                        kind="lost", time=0.0, generation=self._agreed.verdict.generation, node=node, name=name,
                        seconds=seconds,
                        note=f"{name} has not been heard of for {seconds:.0f} s: it is down, stopped or cut off; "
                        f"on {self._job.name} {self._run.last_saved()}",
                    )
                )  # fmt: skip
            raise Disrupted

    def _lost(self) -> dict[int, float]:
        """Nodes that are lost, with the seconds since they were last heard of: those that a first node finds so.

        It tells the others before it leaves this generation, lest they take it for a newcomer.
        """
        found = self._board.find(_LOST, dict[int, float])
        if found is None:
            found = self._meeting.beats.silent()
            if found:
                self._board.put(_LOST, found)
        return found

    def _speaks_of(self, lost: Collection[int]) -> bool:
        """Whether this node is the first that is left, which notes who is lost."""
        return next(node for node in self._agreed.verdict.members if node not in lost) == self._job.node

    def _pass_on_requests(self, ranks: OwnRanks) -> None:
        """Have a request to end, made on any node, heard on all; and let newcomers in."""
        board = self._board
        if self._asked() > 1:
            raise KeyboardInterrupt
        if self._asked() or self._run.stop_requested():
            self._put_once("stop")
        if self._leaving():
            self._put_once(f"leaves/{self._job.node}")
            self._put_once("yield")
        if self._meeting.serves and not board.has("yield") and self._are_newcomers():
            note = "another node is there: the run saves, and goes on with it"
            number = self._agreed.verdict.generation
            self._teller.event(NodeEvent(kind="returned", time=0.0, generation=number, note=note))
            board.put("yield", True)
        if board.has("stop") and not self._run.stop_requested():
            ranks.stop()
        if board.has("yield") and not self._yields:
            self._yields = True
            ranks.make_way()

    def _put_once(self, word: str) -> None:
        if not self._board.has(word):
            self._board.put(word, True)

    def _are_newcomers(self) -> bool:
        now = time.monotonic()
        if now - self._looked < _NEWCOMERS_S:
            return False
        self._looked = now
        return newcomers(self._rendezvous) > 0 and not self._board.has(_LOST)

    def _blame(self, error: JobError) -> None:
        """Wait for a moment whether a failure is a lost node's; then tell the others and raise what failed first."""
        now = time.monotonic()
        if not self._failed_at:
            self._failed_at = now
            of_others = any(word in error.message.splitlines()[0].lower() for word in _OF_OTHERS)
            own = Failure(name=self._job.name, message=error.message, try_=error.try_, of_others=of_others)
            self._board.put(f"failed/{self._job.node}", own)
            self._put_once(_FAILED)
        if now - self._failed_at >= _BLAME_S or not self._failures()[0].of_others:
            self._raise_failure()

    def _hear_of_failures(self) -> None:
        """End with others whose ranks have failed by their own fault."""
        found = self._failures() if self._board.has(_FAILED) else []  # looked at often, and there are many nodes
        if found and not found[0].of_others:
            self._raise_failure()

    def _failures(self) -> list[Failure]:
        """Failures known so far, those first that are no consequence of another."""
        keys = [f"failed/{node}" for node in self._agreed.verdict.members]
        found = [each for key in keys if (each := self._board.find(key, Failure)) is not None]
        return sorted(found, key=lambda each: each.of_others)

    def _raise_failure(self) -> None:
        first = self._failures()[0]
        where = "" if len(self._agreed.facts) == 1 else f"{first.name}: "
        raise JobError(f"{where}{first.message}", try_=first.try_)

    def _conclude(self, mirror: Mirror | None) -> Outcome:
        """The outcome, by the leader; files that it has are fetched."""
        if self._meeting.serves:
            self._board.put("outcome", self._outcome())
        outcome = cast(Outcome, self._board.take("outcome", str))
        if outcome == "finished" and mirror is not None:
            mirror.stop()
        self.stays = tuple(self._staying())  # the store may go with its leader
        leaves = outcome == "again" and self._job.node not in self.stays
        with suppress(Disrupted, CutOff):  # who is lost by now changes nothing of the outcome
            self._say_goodbye(waits=self._meeting.serves and (outcome != "again" or leaves))
        if leaves:
            raise Left
        if outcome == "failed":
            raise JobError("the ranks ended without finishing the run", try_=f"read {self._run.logs}")
        return outcome

    def _say_goodbye(self, *, waits: bool) -> None:
        """waits: whether to stay until all have said it: they copy the run's last files first."""
        self._board.put(f"bye/{self._job.node}", True)
        until, keys = time.monotonic() + _GOODBYE_S, [f"bye/{node}" for node in self._agreed.verdict.members]
        # Not as others are waited for elsewhere: who leaves would leave before they have heard it.
        while waits and not self._board.has(*keys) and time.monotonic() < until:
            if self._meeting.beats.silent():
                return
            time.sleep(_LOOK_S)

    def _outcome(self) -> Outcome:
        board = self._board
        if self._run.result() is not None:
            return "finished"
        if board.has("stop"):
            return "stopped"
        if not board.has("yield"):
            return "failed"
        return "again" if self._staying() else "stopped"

    def _staying(self) -> list[int]:
        """Nodes of the generation that were not told to leave."""
        return [node for node in self._agreed.verdict.members if not self._board.has(f"leaves/{node}")]


def describe_start(agreed: Agreed) -> str:
    """'a, b and c go on from step 40, 3 ranks'; nodes without ranks stand by, and are named."""
    used = 1 + max(rank.node for rank in agreed.plan.ranks)
    names = [agreed.facts[node].name for node in agreed.verdict.members]
    step, ranks = agreed.verdict.step, counted(agreed.plan.world_size, "rank")
    many = used > 1
    start = ("begin" if many else "begins") if step is None else f"{'go' if many else 'goes'} on from step {step}"
    idle = names[used:]
    by = f"; {listed(idle)} {'stand' if len(idle) > 1 else 'stands'} by: {_why_idle(agreed)}" if idle else ""
    return f"{listed(names[:used])} {start}, {ranks}{by}"


def _why_idle(agreed: Agreed) -> str:
    """Why nodes stand by; of a run that begins, with the samples of a step that would have all of them work."""
    spec = agreed.plan.spec
    why = f"the {spec.batch} samples of a step are not spread over more"
    if agreed.verdict.step is not None:
        return why
    each = sum(agreed.facts[node].gpus for node in agreed.verdict.members) * (spec.micro_batch or 1)
    return f"{why}; global_batch={-(-spec.batch // each) * each} would be"
