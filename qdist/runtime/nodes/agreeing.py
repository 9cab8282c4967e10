"""How the nodes of one rendezvous come to a plan: facts, the verdict, what each prepares, the files of the run."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from qdist.core.errors import PlanError, QdistError, RunError, SpecError
from qdist.core.machine.cluster import Cluster, joined
from qdist.core.nodes.agreement import (
    require_agreement,
    require_one_run,
    require_own_numbers,
    require_same_prepared,
)
from qdist.core.nodes.facts import NodeFacts, PreparedFacts, Verdict, Written
from qdist.core.nodes.job import NodeJob
from qdist.core.nodes.membership import why_waiting
from qdist.core.planning.disk import storage
from qdist.core.planning.plan import Plan, Prepared
from qdist.core.spec.run_spec import RunSpec, resolve
from qdist.host.files import write_atomic
from qdist.host.launch import prepare
from qdist.host.launch.claim import clear, write_files
from qdist.host.nodes.checkpoints import fetch_checkpoint, send_checkpoint
from qdist.host.nodes.facts import RUN_ID, facts_here
from qdist.host.nodes.mirror import send_history
from qdist.host.nodes.network import measured_network
from qdist.host.nodes.remote import Files
from qdist.host.run.rundir import PLAN, RESULT, RunDir
from qdist.runtime.nodes.board import Board, CutOff, Disrupted
from qdist.runtime.nodes.meeting import Meeting

_QUICK_S = 60.0
"""Seconds within which a node that lives says its facts, or the leader its verdict."""
_OF_RUN = (PLAN, RUN_ID, "recipe.toml", "machine.json", "versions.json")
"""Files that a leader without the run needs of a node that has it."""


class Memory(NamedTuple):
    """What a node knows of the run since its agent was started."""

    generation: int = 0
    members: tuple[int, ...] = ()
    active: bool = False
    prepared: Prepared | None = None


class Waiting(Exception):
    """These nodes do not go on by themselves; its text says why."""


class Agreed(NamedTuple):
    """One generation, agreed on and written."""

    plan: Plan
    verdict: Verdict
    facts: Mapping[int, NodeFacts]
    prepared: Prepared
    leads: bool
    keeps: bool
    """Whether this node's run directory is its own, and not the leader's."""

    @property
    def name_of(self) -> Callable[[int], str]:
        return lambda node: self.facts[node].name


class Agreement:
    """The steps of an agreement, as one node takes them. All raise Disrupted where a node is lost meanwhile.

    place, size: of this node in the rendezvous.
    """

    def __init__(self, job: NodeJob, meeting: Meeting, board: Board, memory: Memory, *, place: int, size: int) -> None:
        self._job, self._meeting, self._board, self._memory = job, meeting, board, memory
        self._place, self._size, self._run = place, size, RunDir(job.run)

    def reach(self) -> Agreed:
        """Raises QdistError where the run cannot go on, Waiting where it is to wait for other nodes."""
        facts = self._all_facts()
        leader = self._board.take("leader", int, limit_s=_QUICK_S)
        if leader not in facts:  # it was too slow to be counted in: all have to meet again
            raise Disrupted
        verdict = self._verdict(facts, leader)
        if verdict.refuse:
            raise RunError(verdict.refuse, try_=verdict.try_)
        if verdict.wait:
            raise Waiting(verdict.wait)
        self._brought_run(verdict, facts)
        here = _cluster(verdict.members, facts)
        prepared = self._prepare(verdict, here)
        keeps = not self._meeting.serves and not facts[self._job.node].sees_shared
        files = self._written(verdict, facts, prepared, keeps=keeps)
        plan = msgspec.json.decode(files[PLAN], type=Plan)
        return Agreed(plan, verdict, facts, prepared, self._meeting.serves, keeps)

    def _all_facts(self) -> dict[int, NodeFacts]:
        """Everyone's facts, by node."""
        shared = self._sees_shared()
        own = msgspec.structs.replace(
            facts_here(self._job),
            sees_shared=shared,
            generation=self._memory.generation,
            members=self._memory.members,
            active=self._memory.active,
            resume=self._job.resume,
        )
        self._board.put(f"facts/{self._place}", own)
        found = [self._board.take(f"facts/{place}", NodeFacts, limit_s=_QUICK_S) for place in range(self._size)]
        everyone = {each.node: each for each in sorted(found, key=lambda each: each.node)}
        self._meeting.beats.watch(everyone)  # whose leader stays until they know how it ended
        require_own_numbers(found)
        return everyone

    def _sees_shared(self) -> bool:
        """Whether this node's run directory is the leader's: it sees the file that the leader made there."""
        if self._meeting.serves:
            self._board.put("leader", self._job.node)
            name = f".nonce-{secrets.token_hex(8)}"
            (self._run.path / name).touch()
            try:
                self._board.put("nonce", name)
                for place in range(self._size):
                    if place != self._place:
                        self._board.take(f"looked/{place}", bool, limit_s=_QUICK_S)
            finally:
                (self._run.path / name).unlink(missing_ok=True)
            return True
        name = self._board.take("nonce", str, limit_s=_QUICK_S)
        there = (self._run.path / name).exists()
        self._board.put(f"looked/{self._place}", there)
        return there

    def _verdict(self, facts: Mapping[int, NodeFacts], leader: int) -> Verdict:
        if self._meeting.serves:
            self._board.put("verdict", judged(facts, leader, self._job, self._run))
        return self._board.take("verdict", Verdict, limit_s=_QUICK_S)

    def _brought_run(self, verdict: Verdict, facts: Mapping[int, NodeFacts]) -> None:
        """Bring the run here. Raises CutOff where that fails because the leader is gone."""
        try:
            self._bring_run(verdict, facts)
        except RunError as error:
            if self._meeting.files is not None and not _answers(self._meeting.files):
                raise CutOff(error.message) from error
            raise

    def _bring_run(self, verdict: Verdict, facts: Mapping[int, NodeFacts]) -> None:
        """See that this node has the run's last checkpoint in its own directory, if there is one."""
        files, own = self._meeting.files, self._job.node
        if verdict.source == own and files is not None:
            for name in _OF_RUN:
                if (self._run.path / name).is_file():
                    files.put(name, (self._run.path / name).read_bytes())
            if verdict.step is not None:
                send_checkpoint(files, self._run, verdict.step)
            send_history(files, self._run)
            self._board.put("brought", True)
        if verdict.source is not None:
            self._board.take("brought", bool)
        if verdict.spec:
            return
        if files is None:
            self._board.put("plan", (self._run.path / PLAN).read_text())
            return
        if facts[own].sees_shared:
            return
        plan = self._board.take("plan", str)
        write_atomic(self._run.path / PLAN, plan)  # one that is there may be of before this node was lost
        if verdict.step is not None and verdict.step not in facts[own].steps:
            fetch_checkpoint(files, self._run, verdict.step)

    def _prepare(self, verdict: Verdict, here: Cluster) -> Prepared:
        """Pack and tokenize on every node, and compare."""
        prepared, error = self._memory.prepared, None
        if prepared is None:
            try:
                prepared = prepare.prepared_for(self._asked(verdict, here))
            except QdistError as failed:
                error = failed
        self._board.put(f"prepared/{self._place}", _digests(self._job, prepared, error))
        everyone = [self._board.take(f"prepared/{place}", PreparedFacts) for place in range(self._size)]
        if error is not None and len(everyone) == 1:
            raise error
        spec = self._asked(verdict, here).spec
        require_same_prepared(sorted(everyone, key=lambda each: each.node), model=spec.model, data=spec.data.path or "")
        assert prepared is not None
        return prepared

    def _asked(self, verdict: Verdict, here: Cluster) -> prepare.Asked:
        if not verdict.spec:
            return prepare.resumed(self._run, self._changes(), here)
        return prepare.Asked(self._run, msgspec.json.decode(verdict.spec, type=RunSpec), here)

    def _changes(self) -> Mapping[str, Any]:
        """Settings given again with --resume; those of a run that only goes on are in its plan."""
        return {} if self._memory.active or not self._job.resume else self._job.settings

    def _written(
        self, verdict: Verdict, facts: Mapping[int, NodeFacts], prepared: Prepared, *, keeps: bool
    ) -> dict[str, str]:
        """Have the leader plan, and write its files on every node that has a run directory of its own."""
        if self._meeting.serves:
            self._board.put("files", self._planned(verdict, facts, prepared))
        written = self._board.take("files", Written)
        if written.refuse:
            raise RunError(written.refuse, try_=written.try_)
        if written.wait:
            raise Waiting(written.wait)
        if self._meeting.serves or keeps:
            clear(self._run)
            (self._run.path / RESULT).unlink(missing_ok=True)
            for pulse in self._run.pulses.glob("*.json"):
                pulse.unlink(missing_ok=True)
            write_files(self._run, written.files)
            write_atomic(self._run.path / RUN_ID, verdict.run_id)
        self._board.put(f"written/{self._place}", True)
        for place in range(self._size):
            self._board.take(f"written/{place}", bool, limit_s=_QUICK_S)
        return written.files

    def _planned(self, verdict: Verdict, facts: Mapping[int, NodeFacts], prepared: Prepared) -> Written:
        """The run on all nodes; or on fewer of them, where its samples cannot be spread over all."""
        first: QdistError | None = None
        for count in range(len(verdict.members), 0, -1):
            asked = self._asked(verdict, _cluster(verdict.members[:count], facts))
            try:
                job = prepare.job_of(asked, prepared)
                if verdict.spec:  # those of a run that goes on have most of it there
                    require_agreement(list(facts.values()), needed_bytes=storage(job.plan).total)
                return Written(files=job.files)
            except SpecError as error:
                first = first or error
            except PlanError as error:
                if self._memory.active:  # it fitted on more nodes
                    return Written(wait=error.message)
                return Written(refuse=error.message, try_=error.try_)
            except QdistError as error:
                return Written(refuse=error.message, try_=error.try_)
        assert first is not None
        return Written(refuse=first.message, try_=first.try_)


def _answers(files: Files) -> bool:
    try:
        files.hello()
    except RunError:
        return False
    return True


def require_fit(job: NodeJob, meeting: Meeting) -> None:
    """Raise RunError where this node does not fit a run at work: it ends alone, and disturbs nobody."""
    if meeting.serves or (leader := meeting.facts()) is None:
        return
    own = facts_here(job)
    require_agreement([leader, own])
    require_one_run([each for each in (leader, own) if each.run_id], going=True, resume=job.resume, run=job.run)


def judged(facts: Mapping[int, NodeFacts], leader: int, job: NodeJob, run: RunDir) -> Verdict:
    """The leader's verdict on who is there. run: the leader's."""
    everyone = list(facts.values())
    known = max(everyone, key=lambda each: each.generation)
    order = (leader, *(node for node in facts if node != leader))
    generation = known.generation + 1
    holders = [each for each in everyone if each.run_id]
    going = any(each.active for each in everyone)
    try:
        require_one_run(holders, going=going, resume=job.resume, run=str(run.path))
        require_agreement(everyone)
        newest = max(holders, key=lambda each: (max(each.steps, default=-1), each.node == leader), default=None)
        spec = "" if newest else msgspec.json.encode(_own_run(resolve(job.settings), run)).decode()
    except QdistError as error:
        return Verdict(generation=generation, refuse=error.message, try_=error.try_)
    if reason := why_waiting(facts.keys(), known.members, job.least):
        return Verdict(generation=generation, wait=reason)
    has_it = newest is None or newest.node == leader or facts[newest.node].sees_shared
    return Verdict(
        generation=generation,
        members=order,
        run_id=newest.run_id if newest else secrets.token_hex(8),
        spec=spec,
        step=max(newest.steps, default=None) if newest else None,
        source=None if has_it or newest is None else newest.node,
    )


def _own_run(spec: RunSpec, run: RunDir) -> RunSpec:
    return msgspec.structs.replace(spec, run=str(run.path))


def _cluster(members: Sequence[int], facts: Mapping[int, NodeFacts]) -> Cluster:
    there = [facts[node] for node in members]
    network = measured_network([each.address for each in there])
    return joined(
        [each.cluster for each in there], [each.name for each in there], [each.gpus for each in there], network
    )


def _digests(job: NodeJob, prepared: Prepared | None, error: QdistError | None) -> PreparedFacts:
    if prepared is None:
        message, attempt = (error.message, error.try_) if error else ("", "")
        return PreparedFacts(node=job.node, name=job.name, weights="", data="", error=message, try_=attempt)
    source, data = prepared.source, prepared.data
    weights = source.digest or source.original or source.fingerprint
    counts = json.dumps([data.digest, data.samples, data.tokens, data.longest]) if data else ""
    content = hashlib.sha256(counts.encode()).hexdigest() if counts else ""
    return PreparedFacts(node=job.node, name=job.name, weights=weights, data=content)
