"""What happens to a run's nodes: lines of `RUN/nodes.jsonl`, which every node keeps, and what they come to."""

from collections.abc import Iterable, Mapping, Set
from typing import Literal, NamedTuple

import msgspec

from qdist.core.telemetry.history import RunHistory
from qdist.core.text import counted, first_few, format_duration


class NodeMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node of a generation."""

    node: int
    name: str
    address: str
    ranks: tuple[int, ...] = ()


class NodeEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line.

    formed: a generation of nodes begins to work on `members` from `step`. lost: `name` is not heard of any more.
    waiting: those who are left cannot go on alone. returned: `name` is back, and the run is about to grow.
    stopped, finished, failed: the run's end.
    """

    kind: Literal["formed", "lost", "waiting", "returned", "stopped", "finished", "failed"]
    time: float
    """Seconds since the epoch, by the clock of the node that wrote the line."""
    generation: int = 0
    node: int | None = None
    name: str = ""
    seconds: float = 0.0
    """Of 'lost': seconds since it was last heard of."""
    step: int = 0
    """Of 'formed': the step of the checkpoint that it goes on from."""
    members: tuple[NodeMember, ...] = ()
    note: str = ""
    """The sentence for the user."""


_SAME_S = 60.0
"""Seconds by which the clocks of a run's nodes may differ."""


class Generation(NamedTuple):
    """Nodes, plan and ranks from one forming to the loss or return of a node."""

    number: int
    time: float
    """When it was formed, in seconds since the epoch."""
    step: int
    """Step of the checkpoint that it went on from."""
    members: tuple[NodeMember, ...]


class Absence(NamedTuple):
    """A node that was lost, until it is a member again."""

    name: str
    time: float
    """When it was named as lost, in seconds since the epoch."""
    seconds: float
    """Seconds since it was last heard of, at that time."""
    back: Generation | None = None
    """The generation in which it is a member again; None while it is missing."""


class NodesNow(NamedTuple):
    """A run's nodes so far, folded from its events in the order of the file."""

    generations: tuple[Generation, ...] = ()
    absences: tuple[Absence, ...] = ()
    missing: tuple[Absence, ...] = ()
    """Absences that last."""
    waiting: str = ""
    """Why nobody goes on, as a sentence; empty while ranks work or the run has ended."""
    returning: str = ""
    """That a node is back and not a member yet, as a sentence; empty if none is."""
    paused_s: float = 0.0
    """Seconds from the last sign of a lost node, or the return of one, to the next generation; all together."""
    ended: Literal["stopped", "finished", "failed", ""] = ""
    """How the run ended; empty while it goes on."""
    since: float | None = None
    """When its generation was broken, in seconds since the epoch; None while it works."""

    @property
    def now(self) -> Generation | None:
        """The newest generation."""
        return self.generations[-1] if self.generations else None

    @property
    def members(self) -> tuple[NodeMember, ...]:
        """Nodes of the newest generation."""
        return self.now.members if self.now else ()

    @property
    def name_of_rank(self) -> Mapping[int, str]:
        """Name of the node that each rank is on."""
        return {rank: member.name for member in self.members for rank in member.ranks}

    @property
    def lost_ranks(self) -> frozenset[int]:
        """Ranks of the members that are lost."""
        down = self.down
        return frozenset(rank for member in self.members if member.name in down for rank in member.ranks)

    @property
    def down(self) -> frozenset[str]:
        """Names of the members that are lost."""
        return frozenset(one.name for one in self.missing) & {member.name for member in self.members}


def fold_nodes(events: Iterable[NodeEvent]) -> NodesNow | None:
    """What the events come to; None without any. An event that is there twice counts once.

    An event of an earlier generation, from a node that was cut off, says nothing about the present one.
    """
    seen = NodesNow()
    found = dict.fromkeys(events)
    for event in found:
        seen = _FOLDS[event.kind](seen, event)
    return seen if found else None


def _formed(seen: NodesNow, event: NodeEvent) -> NodesNow:
    if seen.now and not seen.ended and _is_told_again(seen.now, event):
        return seen
    generation = Generation(event.generation, event.time, event.step, event.members)
    names = {member.name for member in event.members}
    seen = _with_unnoted_losses(seen, names, event.time)
    back = {(one.name, one.time) for one in seen.missing if one.name in names}
    paused_s = max(0.0, event.time - seen.since) if seen.generations and seen.since is not None else 0.0
    return seen._replace(
        generations=(*seen.generations, generation),
        absences=tuple(one._replace(back=generation) if (one.name, one.time) in back else one for one in seen.absences),
        missing=tuple(one for one in seen.missing if one.name not in names),
        waiting="",
        returning="",
        paused_s=seen.paused_s + paused_s,
        ended="",
        since=None,
    )


def _with_unnoted_losses(seen: NodesNow, names: Set[str], time: float) -> NodesNow:
    """Count members that are not in the next generation as lost: the node that should have noted it may be the one."""
    known = {one.name for one in seen.missing}
    gone = [member.name for member in seen.members if member.name not in names | known] if not seen.ended else []
    absences = tuple(Absence(name, time, 0.0) for name in gone)
    return seen._replace(absences=seen.absences + absences, missing=seen.missing + absences)


def _is_told_again(known: Generation, event: NodeEvent) -> bool:
    """Whether another node, by its own clock, has noted the same generation."""
    same = (known.number, known.step, known.members) == (event.generation, event.step, event.members)
    return same and abs(known.time - event.time) < _SAME_S


def _lost(seen: NodesNow, event: NodeEvent) -> NodesNow:
    if _is_stale(seen, event) or any(one.name == event.name for one in seen.missing):
        return seen
    absence = Absence(event.name, event.time, event.seconds)
    return seen._replace(
        absences=(*seen.absences, absence),
        missing=(*seen.missing, absence),
        since=event.time - event.seconds if seen.since is None else seen.since,
    )


def _waiting(seen: NodesNow, event: NodeEvent) -> NodesNow:
    of_next_launch = seen.ended and not event.generation
    if _is_stale(seen, event) and not of_next_launch:
        return seen
    names = first_few([one.name for one in seen.missing])
    why = f"too few nodes are left: waiting for {names or 'others'}"
    since = event.time if seen.since is None else seen.since
    return seen._replace(waiting=event.note or why, since=since, ended="")


def _returned(seen: NodesNow, event: NodeEvent) -> NodesNow:
    if _is_stale(seen, event):
        return seen
    sentence = event.note or f"{event.name or 'a node'} is back, and the run is about to grow"
    return seen._replace(returning=sentence, since=event.time if seen.since is None else seen.since)


def _ended(seen: NodesNow, event: NodeEvent) -> NodesNow:
    assert event.kind in ("stopped", "finished", "failed")
    # Whom a later launch does without is not missed there.
    return seen._replace(missing=(), waiting="", returning="", ended=event.kind, since=None)


def _is_stale(seen: NodesNow, event: NodeEvent) -> bool:
    return bool(seen.ended) or (seen.now is not None and 0 < event.generation < seen.now.number)


_FOLDS = {
    "formed": _formed, "lost": _lost, "waiting": _waiting, "returned": _returned,
    "stopped": _ended, "finished": _ended, "failed": _ended,
}  # fmt: skip


def nodes_in_words(seen: NodesNow, now: float) -> list[str]:
    """Sentences about nodes that are lost, waited for or on their way back, without capital and full stop.

    now: seconds since the epoch.
    """
    going_on = [member.name for member in seen.members if member.name not in seen.down]
    others = f": the run goes on with {first_few(going_on)}" if not seen.down and not seen.waiting else ""
    said = [seen.waiting] if seen.waiting else []
    for one in () if seen.returning else seen.missing:
        for_how_long = format_duration(max(0.0, now - one.time + one.seconds))
        said.append(f"{one.name} has not been heard of for {for_how_long}{others}")
    return [*said, seen.returning] if seen.returning else said


def generations_in_words(seen: NodesNow, history: RunHistory) -> str:
    """'3 generations; b lost at step 45, back at step 120; 1 min 12 s of work done twice'; empty if none was broken."""
    if len(seen.generations) < 2 and not seen.absences:
        return ""
    parts = [counted(len(seen.generations), "generation")]
    for one in seen.absences:
        back = f", back at step {one.back.step:,}" if one.back else ""
        parts.append(f"{one.name} lost at step {history.step_reached(one.time - one.seconds):,}{back}")
    if round(history.repeated_s):
        parts.append(f"{format_duration(history.repeated_s)} of work done twice")
    if round(seen.paused_s):
        parts.append(f"{format_duration(seen.paused_s)} until ranks were started again")
    return "; ".join(parts)
