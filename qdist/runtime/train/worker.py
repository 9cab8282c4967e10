"""One rank of a run: `python -m qdist.runtime.train.worker RUN --digest D`, started by `qdist.host.launch.agent`."""

import os
import signal
import warnings
from functools import partial
from typing import Any

from qdist.core.errors import PlanError, RunError
from qdist.core.evaluation.windows import longest_scored
from qdist.core.nodes.job import KEEPS
from qdist.core.planning.plan import Plan, digest
from qdist.core.telemetry.events import Event, write_phases
from qdist.core.telemetry.inventory import lines_of
from qdist.core.text import format_bytes, resuming
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.heartbeat import HeartbeatThread
from qdist.runtime.train.rank import Reporter, StartClock, leave_out_fla, own_rank, run_rank
from qdist.runtime.train.warm_up import warm_up


def main() -> None:
    """Train, as one rank of a run."""
    run_rank(_work)


def _work(plan: Plan, run: RunDir, clock: StartClock) -> None:
    beat = HeartbeatThread(run, int(os.environ["RANK"]))
    stop = _StopRequest(run)
    leave_out_fla(plan)
    number = own_rank(plan)
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
    from qdist.runtime.train.tasks import open_tasks

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
    if len(set(comm.gather(digest(run.plan())))) > 1:
        raise RunError("the ranks of this run read different plans", try_="a run directory that all nodes share")
    report = Reporter(run, comm.rank, devices)
    run_code_for(plan.source)
    tokenizer = load_tokenizer(plan.source)
    if comm.rank == 0:
        rehearse(run)
    tasks = open_tasks(
        plan.spec,
        tokenizer,
        plan.data.wording if plan.data else None,
        longest=longest_scored(plan.spec.seq_len, plan.facts.max_positions),
    )
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
            measure=_meter(plan, tasks, built, place, comm, pad_id) if tasks else None,
            keeps=os.environ.get(KEEPS) == "1",
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
        step = trainer.settle()
        if comm.rank == 0:
            gather(run, step=step)
        answers = before_and_after(plan, built.model, tokenizer, built.forward.samples) if answering else []
        if comm.rank == 0:
            write_result(run, plan, trainer.outcome, answers=answers, peaks=peaks, held=held, inventory=inventory)
        comm.barrier()
        reached_step = trainer.outcome.steps
        report(Event(kind="end", step=reached_step, total_steps=plan.steps, note=trainer.outcome.ended_early))
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    beat.end()


def _meter(plan: Plan, tasks: Any, built: Any, place: Any, comm: Any, pad_id: int) -> Any:
    """What measures a run's tasks, in passes of no more positions than a training step's, unless one item has more."""
    from qdist.runtime.evaluate.scorer import PlacedScorer
    from qdist.runtime.train.tasks import TaskMeter

    longest = longest_scored(plan.spec.seq_len, plan.facts.max_positions)
    positions = plan.micro_batch * plan.seq_len
    return TaskMeter(tasks, PlacedScorer(built.score, place, comm, longest=longest, pad_id=pad_id, positions=positions))


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


if __name__ == "__main__":
    main()
