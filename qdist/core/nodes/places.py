"""Which node of a run is this process: by the flags it was given, or by the launcher that it was started by?"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qdist.core.errors import SpecError
from qdist.core.nodes.launchers import LAUNCHERS, PORT, Launcher, Task
from qdist.core.text import listed

MOST_NODES = 1024
"""Most nodes of a run."""
_OF_MPI = frozenset(("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "PMIX_RANK"))
"""Variables that SLURM and Open MPI set as well, for the libraries of MPI."""
_FIRST_NODE = frozenset(("MASTER_ADDR", "MASTER_PORT"))
"""Variables with which a user of MPI names the first node."""
FLAGS = "--node-rank"
"""Who gives a place that no launcher does."""
_HAND = "--node-rank R --rendezvous HOST:PORT on each node"


class Place(NamedTuple):
    """A node of a run."""

    node: int
    nodes: int
    """Most nodes of the run."""
    least: int
    """Fewest nodes to go on with."""
    rendezvous: str
    """HOST:PORT where the nodes meet."""
    of: str
    """Who says so: 'SLURM', '--node-rank'."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The words with which this machine takes the same place again; none where a launcher gives it."""
        if self.of != FLAGS:
            return ()
        nodes = _written(self.least, self.nodes)
        return ("--nnodes", nodes, "--node-rank", f"{self.node}", "--rendezvous", self.rendezvous)


class NodeFlags(NamedTuple):
    """What the flags say of nodes, checked one by one."""

    least: int | None = None
    nodes: int | None = None
    node: int | None = None
    rendezvous: str = ""


def read_flags(nnodes: str | None, node_rank: int | None, rendezvous: str | None) -> NodeFlags:
    """Read `--nnodes MIN:MAX`, `--node-rank R` and `--rendezvous HOST:PORT`; None for those that are not typed.

    Raises SpecError for values that cannot be.
    """
    least, nodes = node_range(nnodes, "--nnodes") if nnodes is not None else (None, None)
    if rendezvous is not None:
        host_and_port(rendezvous)
    if node_rank is not None and nodes is None and rendezvous is not None:
        raise SpecError(f"--node-rank {node_rank} is one of how many nodes?", try_=f"--nnodes {max(2, node_rank + 1)}")
    if node_rank is not None and not 0 <= node_rank < (nodes or MOST_NODES):
        last = (nodes or MOST_NODES) - 1
        raise SpecError(
            f"--node-rank {node_rank} is not a node: they are numbered from 0 to {last}",
            try_=f"--node-rank 0 to {last}" if last else "--node-rank 0",
        )
    return NodeFlags(least, nodes, node_rank, rendezvous or "")


def node_range(text: str, flag: str) -> tuple[int, int]:
    """Fewest and most nodes from '4' or '2:4'. flag: what gives them, for errors.

    Raises SpecError for what is neither, and for numbers that no run has.
    """
    match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text.strip(), re.ASCII)
    if match is None:
        raise SpecError(f"{flag} {text!r} is neither a number nor MIN:MAX", try_=f"{flag} 2 or {flag} 1:4")
    least, most = int(match[1]), int(match[2] or match[1])
    low, high = (min(max(end, 1), MOST_NODES) for end in sorted((least, most)))
    if least > most:
        raise SpecError(f"{flag} {text} begins with the larger number", try_=f"{flag} {_written(low, high)}")
    if (least, most) != (low, high):
        raise SpecError(f"{flag} {text}: a run has 1 to {MOST_NODES:,} nodes", try_=f"{flag} {_written(low, high)}")
    return least, most


def host_and_port(text: str) -> tuple[str, int]:
    """'node1:29400' or '[fd00::1]:29400' as host and port. Raises SpecError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/@]+)):([0-9]{1,5})", text.strip())
    if match is None:
        alone = re.fullmatch(r"[^\s:\[\]/@]+", text.strip())
        way = f"{text.strip()}:{PORT}" if alone else f"HOST:{PORT}"
        raise SpecError(f"--rendezvous {text!r} is not HOST:PORT", try_=f"--rendezvous {way}")
    host, port = match[1] or match[2], int(match[3])
    if not 1 <= port <= 65_535:
        raise SpecError(f"--rendezvous {text}: a port is a number from 1 to 65,535", try_=f"--rendezvous {host}:{PORT}")
    return host, port


def place_of(
    flags: NodeFlags, environ: Mapping[str, str], ancestors: Sequence[frozenset[str]], *, host: str
) -> Place | None:
    """Where this process is in a run of several nodes; None for a run on this machine alone.

    A launcher's variables count if one of its programs is an ancestor of this process, or if --nnodes says that there
    are other nodes, and the variables name this one.

    ancestors: names of each ancestor, the parent's first. host: this machine's name.
    Raises SpecError for flags and variables that contradict each other, or don't suffice.
    """
    if flags.nodes == 1 and flags.node is None and not flags.rendezvous:
        return None
    if flags.node is not None and flags.rendezvous and flags.nodes is not None:
        return Place(flags.node, flags.nodes, flags.least or flags.nodes, flags.rendezvous, FLAGS)
    found = _found(environ, ancestors, host=host, trusts=flags.nodes is not None and not flags.rendezvous)
    if found is None:
        if flags == NodeFlags():
            return None
        raise _insufficient(flags, environ, ancestors)
    name, task = found
    if task.nodes < 2 and flags == NodeFlags() and name != "PMIx":
        return None
    return _joined(flags, name, task)


def _found(
    environ: Mapping[str, str], ancestors: Sequence[frozenset[str]], *, host: str, trusts: bool
) -> tuple[str, Task] | None:
    """The nearest launcher and what it says. trusts: also one that is not seen, if it names this machine."""
    alive = _alive(environ, ancestors)
    if alive:
        return alive[0].name, alive[0].task(environ)
    for launcher in LAUNCHERS if trusts else ():
        if launcher.mark in environ:
            task = launcher.task(environ)
            if task.host and _short(task.host) == _short(host):
                return launcher.name, task
    return None


def _short(host: str) -> str:
    return host.partition(".")[0].lower()


def _alive(environ: Mapping[str, str], ancestors: Sequence[frozenset[str]]) -> list[Launcher]:
    """Launchers that started this process, the nearest first."""
    return [
        launcher
        for names in ancestors
        for launcher in LAUNCHERS
        if names & launcher.programs and launcher.mark in environ
    ]


def _insufficient(flags: NodeFlags, environ: Mapping[str, str], ancestors: Sequence[frozenset[str]]) -> SpecError:
    """The error for flags that lack others."""
    if flags.nodes is None:
        given = "--rendezvous" if flags.rendezvous else "--node-rank"
        return SpecError(f"{given} is of a run on several nodes, and --nnodes does not say how many", try_="--nnodes 2")
    if flags.rendezvous:
        return SpecError(
            "--rendezvous does not say which node this is", try_="--node-rank 0 on the first, 1 on the next"
        )
    stale = stale_names(environ, ancestors)
    but = f"; {listed(stale)} of this shell are not of a launcher that runs" if stale else ""
    return SpecError(
        f"--nnodes {_written(flags.least, flags.nodes)} does not say where the nodes meet{but}",
        try_=f"{_HAND}, or --hosts FILE",
    )


def _written(least: int | None, most: int | None) -> str:
    return f"{most}" if least == most else f"{least}:{most}"


def _joined(flags: NodeFlags, name: str, task: Task) -> Place:
    """The place that a launcher gives, with what is typed over it."""
    nodes = flags.nodes or task.nodes
    if not nodes:
        raise SpecError(f"{name} does not say how many nodes there are", try_="--nnodes N")
    if flags.nodes is not None and task.nodes and not (flags.least or 1) <= task.nodes <= flags.nodes:
        raise SpecError(
            f"--nnodes {_written(flags.least, flags.nodes)}, and {name} started qdist on {task.nodes}",
            try_=f"--nnodes {task.nodes}, or leave it out",
        )
    node = task.node if flags.node is None else flags.node
    if not 0 <= node < nodes:
        raise SpecError(f"{name} says that this is node {node}, of {nodes} numbered from 0", try_=_HAND)
    rendezvous = flags.rendezvous or task.rendezvous
    if not rendezvous:
        raise SpecError(
            f"{name} does not say which machine the first node is",
            try_=f"--rendezvous HOST:{PORT}, of the first node" + ", or mpirun -x MASTER_ADDR=HOST" * ("MPI" in name),
        )
    host_and_port(rendezvous)
    return Place(node, nodes, flags.least or nodes, rendezvous, name)


def stale_names(environ: Mapping[str, str], ancestors: Sequence[frozenset[str]]) -> tuple[str, ...]:
    """Variables that say where a process is, of launchers that did not start this one. They are not obeyed."""
    alive = _alive(environ, ancestors)
    theirs = {name for launcher in alive for name in launcher.deciding}
    if alive:
        theirs |= _OF_MPI
    if any("MPI" in launcher.name for launcher in alive):
        theirs |= _FIRST_NODE
    names = dict.fromkeys(name for launcher in LAUNCHERS for name in launcher.deciding)
    return tuple(name for name in names if environ.get(name) and name not in theirs)


def stale_line(names: Sequence[str], place: Place | None) -> str:
    """What is said of variables that are not obeyed; empty where there are none."""
    if not names:
        return ""
    why = f"{place.of} says which node this is" if place else "this run is on one machine (--nnodes to join others)"
    return f"{listed(names)} of this shell {'is' if len(names) == 1 else 'are'} not obeyed: {why}"


def program_names(comm: str, arguments: Sequence[str]) -> frozenset[str]:
    """What a process may be known by: its name, its program's, and the script or module that a Python runs.

    comm: the kernel's name of it. arguments: its command line, the program first.
    """
    names = {comm.partition(":")[0], *(word.rpartition("/")[2].partition(":")[0] for word in arguments[:1])}
    if any(name.startswith("python") for name in names):
        names.add(_run_by_python(arguments).rpartition("/")[2])
    return frozenset(names - {""})


def _run_by_python(arguments: Sequence[str]) -> str:
    """The script or module behind a Python's own options; empty if there is none."""
    rest = iter(arguments[1:])
    for word in rest:
        if word in ("-X", "-W"):
            next(rest, "")
        elif word == "-m" or not word.startswith("-"):
            return next(rest, "") if word == "-m" else word
    return ""
