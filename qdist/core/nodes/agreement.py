"""Do the nodes of a run agree on what has to be equal, and has each what the run needs of it?"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from qdist.core.errors import RunError
from qdist.core.nodes.facts import NodeFacts, PreparedFacts
from qdist.core.text import counted, first_few, format_bytes, format_duration, listed

COMPUTING = ("qdist", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "triton")
"""Packages whose versions decide what a step computes."""
CODE = "code"
"""Name among the versions of a digest of qdist's own files: checkouts of one version differ."""
CLOCK_S = 60.0
"""Most seconds that the clocks of two nodes may be apart: heartbeats and events carry times."""
_SHORT = 8
"""Characters of a digest that are shown."""
Asked = tuple[float, float]
"""Seconds since the epoch, by one clock, between which a node read its own."""


def require_agreement(
    facts: Sequence[NodeFacts],
    *,
    needed_bytes: int = 0,
    cache_bytes: int = 0,
    asked: Sequence[Asked] = (),
) -> None:
    """Raise RunError, naming the first node that cannot take part with the others and the figures of both sides.

    needed_bytes: that the run leaves in a run directory. cache_bytes: that preparing leaves in a cache.
    asked: for each node, when it was asked and when it had answered, by the clock of who asks, which is that of the
    first node; without it clocks are not compared.
    """
    _require_versions(facts)
    _require_gpus(facts)
    for one in facts:
        _require_room(one, one.free_bytes, needed_bytes, "its run directory", "the run")
        _require_room(one, one.cache_free_bytes, cache_bytes, "its cache", "preparing the model")
    for one, between in zip(facts, asked, strict=False):
        _require_time(one, between, facts[0].name)


def _require_versions(facts: Sequence[NodeFacts]) -> None:
    """Raise RunError for versions that differ from those that most nodes have."""
    stated = [(one.name, dict(_computing(one.versions))) for one in facts]
    names = [name for name in ("Python", *COMPUTING) if len({versions.get(name) for _, versions in stated}) > 1]
    if not names and len({versions.get(CODE) for _, versions in stated}) > 1:
        odd, usual = _odd_one([(name, versions.get(CODE, "")) for name, versions in stated])
        raise RunError(
            f"{odd[0]} has other code of the same qdist ({odd[1][:_SHORT]}) than {usual[0]} ({usual[1][:_SHORT]})",
            try_=f"the same files on both: git pull, or rsync from {usual[0]} to {odd[0]}",
        )
    if not names:
        return
    odd, usual = _odd_one([(name, versions.get(names[0], "")) for name, versions in stated])
    theirs, ours = dict(stated)[odd[0]], dict(stated)[usual[0]]
    differing = [name for name in names if theirs.get(name) != ours.get(name)]
    raise RunError(
        f"{odd[0]} has {_listed(differing, theirs)}, and {usual[0]} has {_listed(differing, ours)}",
        try_=_mended(odd[0], differing, ours),
    )


def _computing(versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What has to be equal of versions: Python's without its last number."""
    yield "Python", ".".join(versions.get("python", "").split(".")[:2])
    yield from ((name, versions[name]) for name in (*COMPUTING, CODE) if name in versions)


def _odd_one(values: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The first node with another value than most, or than the first of as many; and the first one with that."""
    most = Counter(value for _, value in values).most_common(1)[0][0]  # of equals the one that came first
    return next(each for each in values if each[1] != most), next(each for each in values if each[1] == most)


def _listed(names: Sequence[str], versions: Mapping[str, str]) -> str:
    return first_few([f"{name} {versions[name]}" if versions.get(name) else f"no {name}" for name in names])


def _mended(node: str, names: Sequence[str], versions: Mapping[str, str]) -> str:
    """How to give a node the versions that the others have."""
    if names[0] == "Python":
        return f"Python {versions['Python']} on {node}; python = PATH in the hosts file names it"
    lacking = [name for name in names if not versions.get(name)]
    if lacking:
        return f"pip uninstall {' '.join(lacking)} on {node}, or have it on all"
    return f"on {node}: pip install {' '.join(f'{name}=={versions[name]}' for name in names)}"


def _require_gpus(facts: Sequence[NodeFacts]) -> None:
    """Raise RunError for a node without GPUs among others that have some, and for one with fewer than asked of it."""
    with_gpus = next((one for one in facts if one.cluster.device == "cuda"), None)
    if with_gpus is None:
        return
    for one in facts:
        there = len(one.cluster.gpus)
        if one.cluster.device == "cpu":
            has = counted(len(with_gpus.cluster.gpus), "GPU")
            raise RunError(
                f"{one.name} has no GPU that a run can use, and {with_gpus.name} has {has}",
                try_=f"qdist doctor on {one.name}, or leave it out",
            )
        if one.gpus > there:
            raise RunError(
                f"{one.name} has {counted(there, 'GPU')}, and the run is to use {one.gpus} there",
                try_=f"gpus = {there} for {one.name} in the hosts file, or --gpus {there}",
            )


def require_own_numbers(facts: Sequence[NodeFacts]) -> None:
    """Raise RunError where two nodes of a run that is about to begin have one number.

    A run that is at work is not ended for a newcomer's mistake.
    """
    if any(one.active for one in facts):
        return
    numbers = Counter(one.node for one in facts)
    twice = next((node for node, count in numbers.items() if count > 1), None)
    if twice is not None:
        names = listed([one.name for one in facts if one.node == twice])
        raise RunError(f"{names} are both node {twice} of this run", try_="another --node-rank on one of them")


def require_one_run(holders: Sequence[NodeFacts], *, going: bool, resume: bool, run: str) -> None:
    """Raise RunError where nodes hold different runs, or one that nobody has said to go on with.

    holders: nodes that have a run in the run directory. going: whether it is at work. run: the run directory.
    """
    if not holders:
        if resume and not going:
            raise RunError(f"no node has a run in {run} to go on with", try_="leave --resume out")
        return
    if len({one.run_id for one in holders}) > 1:
        odd, usual = _odd_one([(one.name, one.run_id) for one in holders])
        raise RunError(
            f"{run} on {odd[0]} holds another run (of id {odd[1][:_SHORT]}) than on {usual[0]} ({usual[1][:_SHORT]})",
            try_=f"another --run, or move that of {odd[0]} away",
        )
    if not going and not resume:
        raise RunError(f"{run} on {holders[0].name} holds a run", try_="--resume with the same --run, or another --run")


def _require_room(one: NodeFacts, free_bytes: int, needed_bytes: int, where: str, what: str) -> None:
    if free_bytes < needed_bytes:
        raise RunError(
            f"{one.name} has {format_bytes(free_bytes)} free on the disk of {where}, and {what} needs "
            f"{format_bytes(needed_bytes)}",
            try_=f"make room on {one.name}",
        )


def _require_time(one: NodeFacts, between: Asked, first: str) -> None:
    """Raise RunError for a clock that is off, however long asking took."""
    began, ended = between
    ahead = one.clock - ended if one.clock > ended else min(0.0, one.clock - began)
    if abs(ahead) > CLOCK_S:
        way = "ahead of" if ahead > 0 else "behind"
        raise RunError(
            f"the clock of {one.name} is {format_duration(abs(ahead))} {way} that of {first}",
            try_=f"timedatectl set-ntp true, on {one.name}",
        )


def require_same_prepared(prepared: Sequence[PreparedFacts], *, model: str = "", data: str = "") -> None:
    """Raise RunError for a node that could not prepare, or prepared other weights or data than most nodes.

    model, data: what the run calls them.
    """
    if failed := next((one for one in prepared if one.error), None):
        raise RunError(f"{failed.name}: {failed.error}", try_=failed.try_)
    for what, name, found in (
        ("weights", model, [(one.name, one.weights) for one in prepared]),
        ("data", data, [(one.name, one.data) for one in prepared]),
    ):
        if len({digest for _, digest in found}) > 1:
            raise _another(what, name, *_odd_one(found))


def _another(what: str, name: str, odd: tuple[str, str], usual: tuple[str, str]) -> RunError:
    """The error for what differs. name: of the model or the data; odd, usual: nodes and their digests."""
    own, others = odd[1][:_SHORT] or "none", usual[1][:_SHORT] or "none"
    if what == "weights":
        return RunError(
            f"{odd[0]} has other packed weights ({own}) than {usual[0]} ({others}): {name or 'the model'} is likely "
            "another one there, or was packed on another kind of device",
            try_=f"copy the model from {usual[0]} to {odd[0]}, or name one that both see",
        )
    return RunError(
        f"{odd[0]} has other data ({own}) than {usual[0]} ({others}): {name or 'a file of the data'} is likely not the "
        "same there",
        try_=f"copy it from {usual[0]} to {odd[0]}, or name one that both see",
    )
