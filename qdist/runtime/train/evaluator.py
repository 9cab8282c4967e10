"""One rank of an evaluation: `python -m qdist.runtime.train.evaluator DIRECTORY --digest D`."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.errors import JobError, RunError
from qdist.core.evaluation.job import FOUND, JOB, EvaluationJob
from qdist.core.evaluation.results import Evaluation, ScoredTask, TaskResult
from qdist.core.evaluation.words import task_words
from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Plan, digest
from qdist.core.telemetry.events import Event
from qdist.host.files import write_atomic
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.heartbeat import HeartbeatThread
from qdist.runtime.train.rank import Reporter, StartClock, leave_out_fla, own_rank, run_rank
from qdist.runtime.train.warm_up import warm_up


def main() -> None:
    """Evaluate, as one rank of several or alone."""
    run_rank(_work)


def _work(plan: Plan, run: RunDir, clock: StartClock) -> None:
    beat = HeartbeatThread(run, int(os.environ["RANK"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher's to answer
    leave_out_fla(plan)
    number = own_rank(plan)
    warm_up(plan, plan.world.local_rank_of(number))
    import torch

    from qdist.runtime.kernels.libraries import import_bitsandbytes

    import_bitsandbytes()
    from transformers.utils import logging

    from qdist.runtime.engine.torch import Comm
    from qdist.runtime.infer.load import load_tokenizer
    from qdist.runtime.model.own_code import run_code_for
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.group import join_group
    from qdist.runtime.train.setup import pick_devices

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of texts that are longer than the model, which are cut into windows
    beat.move("loading")
    devices = pick_devices(plan, number)
    join_group(plan)
    comm = Comm(devices[0])
    place = placement_of(plan, comm.rank, devices)
    if len(set(comm.gather(digest(run.plan())))) > 1:
        raise RunError("the ranks read different plans", try_="a directory that all nodes share")
    run_code_for(plan.source)
    job = read_typed(run.path / JOB, EvaluationJob, RunError)
    report = Reporter(run, comm.rank, devices)
    work = _Work(plan, job, place, comm, load_tokenizer(plan.source), beat=beat, report=report)
    try:
        found = list(work.evaluations())
    except torch.OutOfMemoryError as error:
        raise JobError(
            f"rank {comm.rank} ran out of GPU memory: {str(error).split('. ')[0]}",
            try_="--placement shard, or more GPUs",
        ) from error
    if comm.rank == 0:
        write_atomic(run.path / FOUND, msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n")
    comm.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    beat.end()


class _Work:
    """The models of a job on this rank, one after the other on the same backbone."""

    def __init__(
        self,
        plan: Plan,
        job: EvaluationJob,
        place: Any,
        comm: Any,
        tokenizer: Any,
        *,
        beat: HeartbeatThread,
        report: Reporter,
    ) -> None:
        self._plan, self._job, self._place, self._comm, self._tokenizer = plan, job, place, comm, tokenizer
        self._beat, self._report = beat, report

    def evaluations(self) -> Iterator[Evaluation]:
        """What was found of each model. Collective."""
        from qdist.runtime.engine.objective import Passes
        from qdist.runtime.evaluate.placed_answers import PlacedAnswers
        from qdist.runtime.evaluate.scorer import PlacedScorer, positions_of
        from qdist.runtime.model.causal import take_whole_rows
        from qdist.runtime.model.skeleton import DTYPES
        from qdist.runtime.train.setup import load_part, put_on

        plan, job = self._plan, self._job
        tasks = self._tasks()
        backbone = load_part(self._place).backbone
        if plan.device == "cuda":
            take_whole_rows(backbone)
        backbone.eval()
        score = self._place.scoring(Passes(backbone, dtype=DTYPES[plan.compute_dtype]))
        pad_id = (self._tokenizer.pad_token_id if self._tokenizer else 0) or 0
        scorer = PlacedScorer(
            score, self._place, self._comm, longest=job.longest, pad_id=pad_id, positions=positions_of(plan)
        )
        dtype, ranks = DTYPES[plan.compute_dtype], plan.data_parallel
        answering = PlacedAnswers(backbone, self._tokenizer, self._comm, dtype=dtype, ranks=ranks)
        for subject in job.subjects:
            if subject.adapter:
                put_on(Path(subject.adapter), backbone, plan)
            results = tuple(self._result(task, scorer, answering, subject.what) for task in tasks)
            where = layout_of(plan).in_words(plan)
            yield Evaluation(
                target=subject.target,
                what=subject.what,
                results=results,
                step=subject.step,
                where=where,
                time=time.time(),
            )

    def _tasks(self) -> list[ScoredTask]:
        """The tasks, all opened before any weight is read."""
        from qdist.runtime.data.wording import usual_wording
        from qdist.runtime.evaluate.tasks import basis_of, open_task

        plan, job = self._plan, self._job
        words = [word for text in job.tasks for word in task_words(text)]
        stored = plan.data.wording if plan.data else None
        basis = basis_of(plan.spec, longest=job.longest)._replace(
            window=job.window,
            stride=job.stride,
            answers=plan.placement == "replicate",
            chat=job.chat,
            samples=self._samples(),
        )
        wording = stored or usual_wording(self._tokenizer)
        return [open_task(word, self._tokenizer, wording, limit=job.limit, basis=basis) for word in words]

    def _samples(self) -> Any:
        """The run's samples, if its tokens are still there."""
        from qdist.runtime.data.batches import read_samples

        data = self._plan.data
        return read_samples(self._plan, pad_id=0) if data and data.path and Path(data.path).is_file() else None

    def _result(self, task: ScoredTask, scorer: Any, answering: Any, what: str) -> TaskResult:
        """A task's result. Collective."""
        from qdist.runtime.evaluate.lm_task import LmTask

        items, began = task.items(), time.monotonic()
        questions = task.questions() if isinstance(task, LmTask) else []
        total = len(items) + len(questions)

        def came_to(count: int) -> None:
            self._beat.move("evaluating", 0, count, total)
            if self._comm.rank == 0:
                note = f"{task.name}, {what}"
                self._report(Event(kind="scored", step=count, total_steps=total, note=note))

        scored = scorer.score(items, came_to)
        if isinstance(task, LmTask):
            answers = answering.answer(questions, lambda count: came_to(len(items) + count)) if questions else []
            found = task.result(scored, answers)
        else:
            found = task.result(scored)
        return msgspec.structs.replace(found, seconds=round(time.monotonic() - began, 3))


if __name__ == "__main__":
    main()
