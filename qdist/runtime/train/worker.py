"""One rank of a run: `python -m qdist.runtime.train.worker RUN --digest D`, started by `qdist.host.launch.agent`."""

import errno
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from qdist.core.errors import PlanError, QdistError, RunError
from qdist.core.machine.environment import AGENT
from qdist.core.machine.world import LocalRank, Rank
from qdist.core.planning.plan import Plan, digest
from qdist.core.telemetry.events import Event, encode, whole_length, write_phases
from qdist.core.telemetry.inventory import lines_of
from qdist.core.text import format_bytes, resuming
from qdist.host.children import end_with_parent
from qdist.host.files import told_of_disks
from qdist.host.run.rundir import PLAN, RunDir
from qdist.runtime.train.heartbeat import HeartbeatThread
from qdist.runtime.train.warm_up import warm_up


def main() -> None:
    """Redirect output to the rank's log, train, and exit with 0 only if everything was written."""
    run, planned = _arguments()
    clock = StartClock(began=(run.path / PLAN).stat().st_mtime)
    clock.mark("launch")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _log_to(run.log_file(rank))
    # Of launch.sh's shell, which became the agent; by hand, of whatever started this.
    end_with_parent(int(os.environ.get(AGENT) or os.getppid()), signal.SIGKILL)
    try:
        plan = run.checked_plan(planned)
        if plan.world_size != world_size:
            raise RunError(
                f"planned for {plan.world_size} ranks, started with {world_size}",
                try_=f"sh {run.path}/launch.sh, which starts them",
            )
        with told_of_disks():
            _work(plan, run, clock)
    except QdistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may be inside a collective that never ends: leave without their goodbye.
        os._exit(1)


def _leave_out_fla(plan: Plan) -> None:
    """Have transformers take its own operations for recurrent layers where the plan says so.

    It takes flash-linear-attention's wherever that can be imported, when a model's class is first imported.
    """
    if plan.recurrence == "torch" and "fla" not in sys.modules:
        hidden: Any = None  # Python's way to say that there is no such module
        sys.modules["fla"] = hidden


def _own_rank(plan: Plan) -> Rank:
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
    raise SystemExit("usage: python -m qdist.runtime.train.worker RUN --digest DIGEST; launch.sh of the run has them")


def _work(plan: Plan, run: RunDir, clock: "StartClock") -> None:
    beat = HeartbeatThread(run, int(os.environ["RANK"]))
    stop = _StopRequest(run)
    _leave_out_fla(plan)
    number = _own_rank(plan)
    warm_up(plan, plan.world.local_rank_of(number))
    import torch

    from qdist.runtime.kernels.libraries import import_bitsandbytes

    import_bitsandbytes()
    from transformers.utils import logging

    from qdist.runtime.engine.torch import Comm
    from qdist.runtime.infer.decoding import before_and_after
    from qdist.runtime.infer.load import load_tokenizer
    from qdist.runtime.model.own_code import run_code_for
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.gradients import GradientWatch
    from qdist.runtime.train.inventory import inventory_of
    from qdist.runtime.train.loop import Trainer
    from qdist.runtime.train.measure import load_peak, memory_now, parts, peak
    from qdist.runtime.train.result import adapter_checksum, gather, rehearse, write_result
    from qdist.runtime.train.setup import assemble, load_part, make_accelerator, pick_devices

    logging.disable_progress_bar()
    # DeepSpeed 0.19's calls, under torch 2.13: the first and often the only words of every rank's log.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    clock.mark("imports")
    beat.move("loading")
    devices = pick_devices(plan, number)
    accelerator = make_accelerator(plan, run)
    comm = Comm(devices[0])
    clock.mark("devices")
    place = placement_of(plan, comm.rank, devices)
    if len(set(comm.gather(digest(plan)))) > 1:
        raise RunError("the ranks of this run read different plans", try_="a run directory that all nodes share")
    report = _Reporter(run, comm.rank, devices)
    run_code_for(plan.source)
    tokenizer = load_tokenizer(plan.source)
    if comm.rank == 0:
        rehearse(run)
    clock.mark("tokenizer")
    try:
        loaded = load_part(place)
        clock.mark("weights")
        report(
            Event(
                kind="load",
                total_steps=plan.steps,
                seconds=loaded.seconds,
                read_bytes=loaded.read_bytes,
                note=_verified(loaded.verified_bytes, summed=loaded.summed),
            )
        )
        loading = tuple(map(load_peak, devices))
        beat.memory_now = partial(memory_now, devices, sum(peak(device).context for device in devices))
        pad_id = tokenizer.pad_token_id if tokenizer else 0
        start = None if run.checkpoint_steps() else plan.start
        built = assemble(place, accelerator, loaded.backbone, pad_id=pad_id, start=start)
        inventory = inventory_of(built.model, plan, built.forward.samples, comm)
        if comm.rank == 0:
            report(Event(kind="inventory", total_steps=plan.steps, note="\n".join(lines_of(inventory))))
        clock.mark("adapter")
        report(Event(kind="starting", total_steps=plan.steps, note=write_phases(clock.seconds)))
        trainer = Trainer(
            plan,
            run,
            built.engine,
            built.forward.samples,
            comm,
            place,
            evaluate=built.evaluate,
            checksum=lambda: adapter_checksum(built.adapter) if plan.zero_stage < 3 else (),
            verify=lambda: _verified(place.verify(loaded.backbone), summed=loaded.summed),
            report=report,
            move=beat.move,
            stopping=stop,
            gradients=GradientWatch(built.adapter.named(), plan.facts, compute_dtype=plan.compute_dtype),
        )
        stop.listen()
        finished = trainer.train()
        reached = tuple(peak(device, load=load) for device, load in zip(devices, loading, strict=True))
        if built.engine.replayed:  # answers need memory, and NCCL ends no communicator that a graph uses
            built.engine.replayed.release()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(plan, run, comm.rank, max(peak(device).total for device in devices), error) from error
    if finished:
        beat.move("finishing", plan.steps)
        peaks, held = comm.gather(reached), comm.gather(parts(built.model, built.engine))
        answering = place.can_answer and plan.spec.train.answers
        if comm.rank == 0:
            gather(run, step=plan.steps)
        answers = before_and_after(plan, built.model, tokenizer, built.forward.samples) if answering else []
        if comm.rank == 0:
            write_result(
                run, plan, held_out=trainer.held_out, answers=answers, peaks=peaks, held=held, inventory=inventory
            )
        comm.barrier()
        report(Event(kind="end", step=plan.steps, total_steps=plan.steps))
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    beat.end()


def _verified(count: int, *, summed: bool) -> str:
    """summed: what the ranks hold was held against the sums of what was packed. Empty where nothing was gathered."""
    if not count:
        return ""
    held = "were packed" if summed else "the ranks hold"
    return f"the {format_bytes(count)} gathered are the bytes that {held}"


def _out_of_memory(plan: Plan, run: RunDir, rank: int, reached_bytes: int, error: Exception) -> PlanError:
    """The error for a GPU that ran out of memory; torch's own account of it goes to the rank's log."""
    print(error, flush=True)
    smaller = max(1, plan.micro_batch // 2)
    return PlanError(
        f"rank {rank} ran out of GPU memory at {format_bytes(reached_bytes)}, where "
        f"{format_bytes(plan.ranks[rank].expected[0].total)} were planned: {str(error).split('. ')[0]}",
        try_=resuming(run.path, "--set", f"micro_batch={smaller}", "--set", "train.checkpointing=true"),
    )


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


class _StopRequest:
    """True once the launcher left a stop file or the scheduler sent SIGTERM; the loop then saves and exits.

    Until it listens there is nothing to save, and SIGTERM ends the rank as it ends any program.
    """

    def __init__(self, run: RunDir) -> None:
        self._run, self._signalled = run, False
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or self._run.stop_requested()


class _Reporter:
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
        import msgspec

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


def _log_to(path: Path) -> None:
    """Redirect everything that this process and its libraries print to the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


if __name__ == "__main__":
    main()
