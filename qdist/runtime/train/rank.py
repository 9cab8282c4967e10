"""What any rank does before and beside its work: finds its place, writes its log and its events, says why it ended."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.errors import QdistError, RunError
from qdist.core.machine.environment import AGENT
from qdist.core.machine.world import LocalRank, Rank
from qdist.core.nodes.job import PREPARED
from qdist.core.planning.plan import Plan, Prepared
from qdist.core.telemetry.events import Event, encode, whole_length
from qdist.host.children import end_with_parent
from qdist.host.files import told_of_disks
from qdist.host.opening import read_typed
from qdist.host.run.rundir import PLAN, RunDir


def run_rank(work: Callable[[Plan, RunDir, "StartClock"], None]) -> None:
    """Redirect output to the rank's log, work, and exit with 0 only if everything was written."""
    run, planned = _arguments()
    clock = StartClock(began=(run.path / PLAN).stat().st_mtime)
    clock.mark("launch")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log_to(run.log_file(rank))
    # Of launch.sh's shell, which became the agent; by hand, of whatever started this.
    end_with_parent(int(os.environ.get(AGENT) or os.getppid()), signal.SIGKILL)
    try:
        plan = as_prepared_here(run.checked_plan(planned), os.environ.get(PREPARED, ""))
        if plan.world_size != world_size:
            raise RunError(
                f"planned for {plan.world_size} ranks, started with {world_size}",
                try_=f"sh {run.path}/launch.sh, which starts them",
            )
        with told_of_disks():
            work(plan, run, clock)
    except QdistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may be inside a collective that never ends: leave without their goodbye.
        os._exit(1)


def as_prepared_here(plan: Plan, file: str) -> Plan:
    """The plan with model and data where this node has prepared them; digests were compared before ranks started.

    file: of a `Prepared`; empty where they lie as the plan says.
    """
    if not file:
        return plan
    own = read_typed(Path(file), Prepared, RunError, try_="launch.sh of the run, or the same launch again")
    data = plan.data and own.data and msgspec.structs.replace(plan.data, path=own.data.path)
    return msgspec.structs.replace(plan, source=own.source, data=data)


def leave_out_fla(plan: Plan) -> None:
    """Have transformers take its own operations for recurrent layers where the plan says so.

    It takes flash-linear-attention's wherever that can be imported, when a model's class is first imported.
    """
    if plan.recurrence == "torch" and "fla" not in sys.modules:
        hidden: Any = None  # Python's way to say that there is no such module
        sys.modules["fla"] = hidden


def own_rank(plan: Plan) -> Rank:
    """This process' number in the run. Raises RunError where the agent has put it on another place of its node."""
    rank, local_rank = Rank(int(os.environ["RANK"])), LocalRank(int(os.environ["LOCAL_RANK"]))
    if plan.world.local_rank_of(rank) != local_rank:
        raise RunError(
            f"rank {rank} is planned as number {plan.world.local_rank_of(rank)} of its node, and was started as "
            f"number {local_rank}",
            try_="launch.sh of the run, which starts them in order",
        )
    return rank


def _arguments() -> tuple[RunDir, str]:
    """The run, and the digest of its launcher's plan."""
    match sys.argv[1:]:
        case [run, "--digest", planned]:
            return RunDir(run), planned
    module = f"qdist.runtime.train.{Path(sys.argv[0]).stem}"
    raise SystemExit(f"usage: python -m {module} RUN --digest DIGEST; launch.sh of the run has them")


class StartClock:
    """Where the time up to a rank's first step goes: seconds by what was done, one phase after the other."""

    def __init__(self, *, began: float) -> None:
        """began: seconds since the epoch at which the run's plan was written."""
        self._last = began
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """End a phase now."""
        now = time.time()
        self.seconds[phase], self._last = max(0.0, now - self._last), now


class Reporter:
    """Appends events to this rank's file, in one write per line."""

    def __init__(self, run: RunDir, rank: int, devices: tuple[Any, ...]) -> None:
        self._rank, self._devices = rank, devices
        path = run.event_file(rank)
        path.parent.mkdir(exist_ok=True)
        # A killed rank may have left half a line behind.
        if path.exists():
            with open(path, "r+b") as torn:
                torn.truncate(whole_length(torn.read()))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, event: Event) -> None:
        from qdist.runtime.train.measure import peak

        complete = msgspec.structs.replace(
            event,
            rank=self._rank,
            time=time.time(),
            memory_bytes=max(peak(device).total for device in self._devices),
        )
        line = encode(complete)
        if os.write(self._descriptor, line) < len(line):  # the next line would be glued to half of this one
            raise OSError(errno.ENOSPC, f"no room for the events of rank {self._rank}")


def log_to(path: Path) -> None:
    """Redirect everything that this process and its libraries print to the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
