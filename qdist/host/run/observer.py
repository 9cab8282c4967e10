"""What a run's ranks have reported since the last call, and a snapshot of the run at any time."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, groupby
from pathlib import Path
from statistics import median

from qdist.core.errors import MachineError, RunError
from qdist.core.machine.cards import rates_of
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import RankPlan
from qdist.core.telemetry.events import Event, State, decode_blocks, whole_length
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodesNow
from qdist.core.telemetry.snapshot import Reading, Snapshot
from qdist.core.text import command, first_few
from qdist.host.machine.probe import ranks_per_gpu
from qdist.host.machine.readings import Readings
from qdist.host.opening import readable, require_file
from qdist.host.run.nodes import NodesReader, how_to_resume
from qdist.host.run.rundir import PLAN, RunDir, of_ranks
from qdist.host.run.state import state_of
from qdist.host.run.watchdog import SILENT_S, PulseReader, environment_of, troubles

_TAIL_BYTES = 1 << 18


class Follower:
    """Reads `<run>/events/rank*.jsonl` as they grow. A line still being written is read once it is complete.

    The run may not have started: files and the folder itself may appear later.
    say: called with a warning, the first time that lines are left out for they are no events.
    """

    def __init__(self, run: Path, *, say: Callable[[str], None] | None = None) -> None:
        self._folder, self._say = run / "events", say
        self.unread = ""
        """A sentence about skipped lines; empty if there are none."""
        self._read_bytes: dict[Path, int] = {}
        self._read_lines: dict[Path, int] = {}
        self._inodes: dict[Path, int] = {}

    def new_events(self) -> list[Event]:
        """Events since the last call, sorted by time; each rank's events keep their order.

        Lines that are no events are left out, and told once.
        """
        streams = [list(chain.from_iterable(self._blocks(path))) for path in self._files()]
        return list(merge(*streams, key=lambda event: event.time))

    def fold_into(self, fold: RunHistory) -> None:
        """Add the events since the last call to a fold: faster if there are many.

        Where another run has taken the folder, the fold begins anew with it.
        """
        if self._replaced():
            self._read_bytes, self._read_lines, self._inodes = {}, {}, {}
            fold.restart()
        for path in self._files():
            rank = int(path.stem.removeprefix("rank"))
            # Rank 0 speaks of all steps; of the others a fold asks how they are now.
            for block in self._blocks(path, most_bytes=None if rank == 0 else _TAIL_BYTES):
                fold.add_of_rank(rank, block)
        fold.unread = self.unread

    def _files(self) -> list[Path]:
        """The event file of each rank, without copies that someone keeps next to them."""
        return of_ranks(self._folder, ".jsonl")

    def _replaced(self) -> bool:
        """Whether a file was replaced or truncated: a resuming rank cuts off at most half a line."""
        there = [(path, path.stat()) for path in self._inodes if path.exists()]
        return any(now.st_ino != self._inodes[path] or now.st_size < self._read_bytes[path] for path, now in there)

    def _blocks(self, path: Path, *, most_bytes: int | None = None) -> Iterator[list[Event]]:
        """The new contents of a file, or the complete lines of its last `most_bytes`."""
        offset, lines = self._read_bytes.get(path, 0), self._read_lines.get(path, 0)
        require_file(path, RunError)
        with readable(path, RunError), path.open("rb") as file:
            self._inodes[path] = os.fstat(file.fileno()).st_ino
            file.seek(offset)
            data = file.read()
        start = data.find(b"\n", len(data) - most_bytes) + 1 if most_bytes and len(data) > most_bytes else 0
        lines += data.count(b"\n", 0, start)
        for block in decode_blocks(data[start:], first_line=lines + 1):
            lines += block.lines
            if block.bad and not self.unread:
                self._tell(path, block.bad)
            yield block.events
        self._read_bytes[path] = offset + whole_length(data)
        self._read_lines[path] = lines

    def _tell(self, path: Path, bad: Sequence[int]) -> None:
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        self.unread = f"{path}: line {bad[0]:,}{more} is not an event, and is left out"
        if self._say:
            self._say(f"warning: {self.unread}")


_STILL_S, _STILL_STEPS = 30.0, 5
"""How long a live rank may stand still: seconds, and multiples of the step time."""
_LOG_BYTES = 1 << 16
_MOST_LOGS = 64


class RunObserver:
    """Follows one run. fold: filled by someone else, such as the launcher; by default its own."""

    def __init__(self, run: RunDir, *, fold: RunHistory | None = None) -> None:
        self.run, self.plan = run, run.plan()
        self._planned = _written(run)
        self._fold = fold or RunHistory(total_steps=self.plan.steps)
        self._follower = None if fold else Follower(run.path)
        self._machine, self._pulses = run.machine(), PulseReader(run)
        self._readings: dict[str | None, Readings] = {}
        """By the GPUs that CUDA_VISIBLE_DEVICES shows."""
        self._nodes = NodesReader(run)

    def snapshot(self, *, log_rank: int | None = None, all_logs: bool = False, log_lines: int = 200) -> Snapshot:
        """The run as of now. Raises RunError for invalid events.

        log_rank: the rank whose log to include, if any. all_logs: whether to include those of all ranks instead.
        """
        if (written := _written(self.run)) != self._planned:  # a resumed run may lie on other GPUs
            self.plan, self._planned, self._machine = self.run.plan(), written, self.run.machine()
        # State before events: a finished run is never shown without its last ones.
        now, state = time.time(), state_of(self.run)
        if self._follower:
            self._follower.fold_into(self._fold)
        pulses = {
            rank: pulse
            for rank, pulse in self._pulses.read(now).items()
            # Beats from before the plan are of an earlier launch.
            if rank < self.plan.world_size and pulse.time >= self._planned / 1e9
        }
        nodes = self._nodes.now()
        message, attempt = _ending(self.run, state, nodes)
        return Snapshot(
            name=self.run.path.name or str(self.run.path),
            plan=self.plan,
            fold=self._fold,
            state=state,
            now=now,
            pulses=pulses,
            troubles=self._troubles(pulses, now, nodes) if state == "running" else (),
            message=message,
            try_=attempt,
            # Ranks are asked to save and end as well where the run is about to grow.
            stopping=state == "running" and self.run.stop_requested() and not (nodes and nodes.returning),
            cards=self._cards(pulses) if state == "running" else {},
            card_bytes=tuple(gpu.total_bytes for gpu in self._machine.gpus) if self._machine else (),
            first_cards=_first_cards(self._machine),
            matmul_flops_s=_matmul_flops_s(self._machine),
            log_rank=log_rank or 0,
            log=() if log_rank is None or all_logs else last_lines(self.run, log_rank, log_lines),
            all_logs=all_logs,
            logs=latest_logs(self.run, self.plan.world_size, log_lines) if all_logs else {},
            nodes=nodes,
        )

    def _troubles(self, pulses: Mapping[int, Heartbeat], now: float, nodes: NodesNow | None) -> tuple[str, ...]:
        # That its ranks are silent is no news of a node that is lost.
        lost = nodes.lost_ranks if nodes else ()
        found = troubles({rank: own for rank, own in pulses.items() if rank not in lost}, now=now, after_s=SILENT_S)
        recent = self._fold.columns.seconds[-10:]
        still_s = max(_STILL_S, _STILL_STEPS * median(recent)) if recent else _STILL_S
        silent = [one for one in found if one.silent]
        # Those that wait for a silent rank are no news.
        return tuple(map(str, silent or [one for one in found if one.seconds >= still_s][:1]))

    def _cards(self, pulses: Mapping[int, Heartbeat]) -> dict[int, tuple[Reading, ...]]:
        """Readings of the GPUs of each rank on this machine, by rank."""
        here = {rank: pulse for rank, pulse in pulses.items() if pulse.host == socket.gethostname()}
        if self.plan.device != "cuda" or not here:
            return {}
        found: dict[int, tuple[Reading, ...]] = {}
        # Several nodes of a run may share a machine, each with GPUs of its own that it numbers from 0.
        for _, ranks in groupby(self.plan.ranks, key=lambda rank: rank.node):
            own = [rank for rank in ranks if rank.rank in here]
            if own:
                found |= self._cards_of(own, _environment(here[rank.rank] for rank in own))
        return found

    def _cards_of(self, ranks: Sequence[RankPlan], environment: Mapping[str, str]) -> dict[int, tuple[Reading, ...]]:
        """Readings of the GPUs of a node's ranks, which `environment` shows them."""
        shown = environment.get("CUDA_VISIBLE_DEVICES")
        try:
            if shown not in self._readings:
                self._readings[shown] = Readings(environment=environment)
            share = ranks_per_gpu(environment)
        except MachineError:
            return {}  # a run is watched all the same
        read = self._readings[shown].read()
        positions = {rank.rank: [gpu // share for gpu in rank.gpus] for rank in ranks}
        return {
            rank: tuple(read[position] for position in own)
            for rank, own in positions.items()
            if all(position < len(read) for position in own)
        }


def _environment(pulses: Iterable[Heartbeat]) -> Mapping[str, str]:
    """The ranks' environment, which may show other GPUs than this process sees; this process's own where unknown."""
    return next(filter(None, map(environment_of, pulses)), os.environ)


def last_lines(run: RunDir, rank: int, count: int) -> tuple[str, ...]:
    """The last lines of a rank's log; empty if it has none yet."""
    path = run.log_file(rank)
    if not path.is_file():
        return ()
    with readable(path, RunError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _LOG_BYTES))
        return tuple(file.read().decode(errors="replace").splitlines()[-count:])


def latest_logs(run: RunDir, ranks: int, count: int) -> dict[int, tuple[str, ...]]:
    """The last lines of the ranks' logs by rank, those first that were written to last; of very many only these."""
    written = {}
    for rank in range(ranks):
        with contextlib.suppress(FileNotFoundError):
            written[rank] = run.log_file(rank).stat().st_mtime_ns
    latest = sorted(written, key=lambda rank: -written[rank])[:_MOST_LOGS]
    return {rank: last_lines(run, rank, count) for rank in latest}


def _first_cards(machine: Cluster | None) -> tuple[int, ...]:
    """Position of each node's first GPU among those of all nodes."""
    counts = [node.gpus for node in machine.nodes] if machine and machine.gpus else []
    return tuple(sum(counts[:node]) for node in range(len(counts)))


def _matmul_flops_s(machine: Cluster | None) -> float | None:
    if machine is None or machine.device == "cpu":
        return None
    if machine.rates:
        return machine.rates.matmul_flops_s
    known = [rates.matmul_flops_s for gpu in machine.gpus if (rates := rates_of(gpu.name))]
    return min(known, default=None)


def _ending(run: RunDir, state: State, nodes: NodesNow | None) -> tuple[str, str]:
    """(what ended a run before its last step, what to try); empty strings if it did not end early."""
    resume = how_to_resume(run, nodes)
    if state == "killed" and nodes and nodes.members and not nodes.ended:
        names = first_few([member.name for member in nodes.members])
        return f"no agent works here any more; its nodes were {names}", f"{command('monitor', run.path)} on one of them"
    if state == "killed":
        return "its launcher recorded no reason", resume
    ended = run.ended() if state in ("failed", "stopped") else None
    return (ended.message, ended.try_ or resume) if ended else ("", "")


def _written(run: RunDir) -> int:
    try:
        return os.stat(run.path / PLAN).st_mtime_ns
    except FileNotFoundError:
        raise RunError(f"{run.path} is not a run: it has no {PLAN}") from None
