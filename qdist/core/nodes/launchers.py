"""What SLURM, torchrun and MPI say of a process that they started: its node, the number of nodes, and where to meet."""

import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

from qdist.core.errors import SpecError

PORT = 29400
"""First of the thousand ports of which a launcher's nodes take one."""
_MOST_NAMES = 65_536
"""Most nodes that SLURM takes in one job by default."""
_BATCH_STEPS, _NO_STEP = 0xFFFFFFF0, 0xFFFFFFFF
"""From here SLURM numbers steps that are not srun's: the batch script, an interactive shell."""
_RANGES = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class Task(NamedTuple):
    """One process of a launcher."""

    node: int
    """Number of its node, from 0."""
    nodes: int
    """How many nodes there are; 0 where the launcher does not say."""
    rendezvous: str
    """HOST:PORT on the first node; empty where the launcher does not say which that is."""
    host: str = ""
    """Name of its node; empty where the launcher does not say."""


class Launcher(NamedTuple):
    """A program that starts processes on nodes."""

    name: str
    programs: frozenset[str]
    """Names of the programs one of which is an ancestor of every process that it starts."""
    mark: str
    """Variable that each of its processes has."""
    deciding: tuple[str, ...]
    """Variables that say where a process is."""
    task: Callable[[Mapping[str, str]], Task]


def expand_nodes(text: str) -> tuple[str, ...]:
    """Names of nodes from SLURM's short form: 'node[01-03,7],gpu5'. Leading zeros are kept.

    Raises SpecError for what is no such list.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):
        pieces = _RANGES.split(part)
        if not part or any(mark in piece for piece in pieces[::2] for mark in "[]"):
            raise _no_list(text)
        choices = [_numbers(piece, text) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        names += ["".join(words) for words in product(*choices)]
        if len(names) > _MOST_NAMES:
            raise _no_list(text)
    return tuple(names)


def _numbers(ranges: str, text: str) -> list[str]:
    """The numbers of '01-03,7' as they are written."""
    numbers: list[str] = []
    for each in ranges.split(","):
        match = _RANGE.fullmatch(each)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < first + _MOST_NAMES:
            raise _no_list(text)
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers


def _no_list(text: str) -> SpecError:
    return SpecError(
        f"{text[:80]!r} is not a list of SLURM's nodes such as node[01-03],gpu5",
        try_="--nnodes, --node-rank and --rendezvous on each node",
    )


def _slurm(environ: Mapping[str, str]) -> Task:
    """A task of `srun`. A batch script, or a shell of salloc, runs on one node alone."""
    step = _number(environ, "SLURM_STEP_ID", _NO_STEP)
    names = environ.get("SLURM_STEP_NODELIST") if step < _BATCH_STEPS else None
    listed = expand_nodes(names or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST") or "localhost")
    nodes = _number(environ, "SLURM_NNODES", len(listed))
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", nodes) if step < _NO_STEP else nodes
    if nodes > 1 and step >= _BATCH_STEPS:
        raise SpecError(
            f"SLURM job {environ['SLURM_JOB_ID']} has {nodes} nodes, and qdist was not started by srun on each of them",
            try_="srun --ntasks-per-node=1 qdist launch ...; or --nnodes 1 for this node alone",
        )
    if step < _BATCH_STEPS:
        _require_one(_number(environ, "SLURM_STEP_NUM_TASKS", nodes), nodes, "SLURM", "srun --ntasks-per-node=1")
    job = _number(environ, "SLURM_JOB_ID", 0)
    host = environ.get("SLURMD_NODENAME", "")
    node = _number(environ, "SLURM_NODEID", 0)
    return Task(node, nodes, f"{listed[0]}:{PORT + job % 1000}", host or (listed[node] if node < len(listed) else ""))


def _torchrun(environ: Mapping[str, str]) -> Task:
    _require_one(_number(environ, "LOCAL_WORLD_SIZE", 1), 1, "torchrun", "torchrun --nproc-per-node 1")
    # On the address of torchrun's own store, never on its port: (p % 1000) + 29400 differs from every p.
    first = environ.get("MASTER_ADDR", "")
    rendezvous = f"{first}:{PORT + _number(environ, 'MASTER_PORT', 0) % 1000}" if first else ""
    return Task(_number(environ, "GROUP_RANK", 0), _number(environ, "GROUP_WORLD_SIZE", 1), rendezvous)


def _of_ranks(rank: str, size: str, local_size: str, name: str, option: str) -> Callable[[Mapping[str, str]], Task]:
    """What variables of these names say. They don't name the first node: `mpirun -x MASTER_ADDR=...` does."""

    def task(environ: Mapping[str, str]) -> Task:
        _require_one(_number(environ, local_size, 1), 1, name, option)
        first = environ.get("MASTER_ADDR", "")
        rendezvous = f"{first}:{_number(environ, 'MASTER_PORT', PORT)}" if first else ""
        return Task(_number(environ, rank, 0), _number(environ, size, 0), rendezvous, environ.get("PMIX_HOSTNAME", ""))

    return task


def _require_one(tasks: int, nodes: int, name: str, option: str) -> None:
    if tasks > nodes:
        where = "this node" if nodes == 1 else f"{nodes} nodes"
        raise SpecError(
            f"{name} started qdist {tasks} times on {where}: once a node is enough, it starts a rank a GPU itself",
            try_=f"{option} ... qdist launch ...",
        )


def _number(environ: Mapping[str, str], name: str, usual: int) -> int:
    text = environ.get(name, "")
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        raise SpecError(f"{name} is {text[:40]!r} in the environment, which is not a number", try_=f"unset {name}")
    return int(text) if text else usual


LAUNCHERS = (
    Launcher(
        "torchrun",
        frozenset(("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate-launch")),
        "TORCHELASTIC_RUN_ID",
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK",
         "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
        _torchrun,
    ),
    Launcher(
        "SLURM", frozenset(("slurmstepd",)), "SLURM_JOB_ID",
        ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NNODES", "SLURM_NODEID", "SLURM_PROCID", "SLURM_JOB_NODELIST"),
        _slurm,
    ),
    Launcher(
        "Open MPI", frozenset(("orted", "prted", "mpirun", "mpiexec", "orterun", "prterun")), "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        _of_ranks("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun",
             "mpirun --map-by ppr:1:node"),
    ),
    Launcher(
        "MPICH", frozenset(("hydra_pmi_proxy",)), "PMI_SIZE",
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
        _of_ranks("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "mpiexec", "mpiexec -ppn 1"),
    ),
    Launcher(
        "PMIx", frozenset(("prted", "prterun", "prte")), "PMIX_RANK",
        ("PMIX_RANK",),
        _of_ranks("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_SIZE", "prun", "prun --map-by ppr:1:node"),
    ),
)  # fmt: skip
"""Every launcher whose variables are known."""
