"""The training loop, top to bottom, with its learning rates and the fp16 loss scale."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from qdist.core.errors import JobError, RunError
from qdist.core.evaluation.course import Outcome, Points, best_figure, points_of, reason_to_stop
from qdist.core.evaluation.results import Figure
from qdist.core.planning.plan import Plan
from qdist.core.spec.sections import Optim
from qdist.core.telemetry.events import Event
from qdist.host.run.rundir import RunDir
from qdist.runtime.data.batches import Samples
from qdist.runtime.data.stream import micro_batch_seed
from qdist.runtime.engine.objective import Evaluate, unseen
from qdist.runtime.engine.torch import Comm, Engine, MicroBatch
from qdist.runtime.placements.base import Placement
from qdist.runtime.train import checkpoint
from qdist.runtime.train.checkpoint import Progress
from qdist.runtime.train.gradients import UPDATES, GradientWatch
from qdist.runtime.train.heartbeat import Move, silent
from qdist.runtime.train.measure import Stopwatch


def learning_rate(optim: Optim, *, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1 - progress)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


_INITIAL, _SMALLEST, _LARGEST = 2.0**16, 2.0**-4, 2.0**24
_GROWTH_INTERVAL = 500


def before_training(what: str, loss: float, *, fp16: bool) -> JobError:
    """The error for a loss that is NaN or infinite before the first update."""
    fault = "weights, data or the range of fp16 are at fault" if fp16 else "weights or data are at fault"
    return JobError(
        f"{what} is {loss} before any training: {fault}, not the learning rate",
        try_="--set dtype=bfloat16" if fp16 else "download the model again, or other data",
    )


class LossScale:
    """Halves when gradients are not finite, doubles after GROWTH_INTERVAL finite steps; fixed at 1 unless fp16."""

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = _INITIAL if dynamic else 1.0
        self.finite_steps = 0

    def update(self, *, skipped: bool, step: int, loss: float, run: RunDir, where: Callable[[], str] = str) -> None:
        """Update the scale after a step.

        loss: of the step, for the error. run: whose checkpoints it names. where: in which tensors gradients are not
        finite, to follow the sentence that says so; asked on all ranks, before the error.

        Raises JobError when gradients are not finite for a reason that no scale can mend.
        """
        if not skipped:
            self.finite_steps += 1
            if self.dynamic and self.finite_steps >= _GROWTH_INTERVAL and self.value < _LARGEST:
                self.value, self.finite_steps = self.value * 2, 0
            return
        if not self.dynamic:
            if step == 1 and not math.isfinite(loss):
                raise before_training("the loss of step 1", loss, fp16=False)
            raise JobError(
                f"{_what(loss)} at step {step}{where()}; {run.last_saved()}",
                try_="a smaller --set optim.lr in a new run: this one would come to the same when resumed",
            )
        self.value, self.finite_steps = self.value / 2, 0
        if self.value < _SMALLEST:
            raise JobError(
                f"{_what(loss)} at step {step} in fp16, even at a loss scale of {self.value * 2:g}{where()}; "
                f"{run.last_saved()}",
                try_="--set dtype=bfloat16, or a smaller optim.lr",
            )


def _what(loss: float) -> str:
    return "gradients are NaN or infinite" if math.isfinite(loss) else f"the loss is {loss}"


Measure = Callable[[Callable[[int, int], None]], Mapping[str, Figure]]
"""The figure of each of `train.tasks`, from all ranks; told how many items are done of how many."""
Report = Callable[[Event], None]
"""Writes an event, filling in this rank, the time and its memory."""


class Trainer:
    """One rank's part of a run.

    place: this rank's side of the placement. verify: compares gathered bytes once more and says so in words.
    gradients: watches those of the first updates; None for a run that does without. measure: the tasks that every
    evaluation measures too; None for a run without. keeps: whether this rank writes checkpoints as rank 0 does, into a
    run directory of its own node.
    """

    def __init__(
        self,
        plan: Plan,
        run: RunDir,
        engine: Engine,
        samples: Samples,
        comm: Comm,
        place: Placement,
        *,
        evaluate: Evaluate,
        checksum: Callable[[], tuple[int, ...]],
        verify: Callable[[], str],
        report: Report,
        move: Move = silent,
        stopping: Callable[[], bool],
        gradients: GradientWatch | None = None,
        measure: Measure | None = None,
        keeps: bool = False,
    ) -> None:
        self.plan, self.run, self.engine, self.samples, self.comm, self.place = plan, run, engine, samples, comm, place
        self._evaluate, self._checksum, self._verify = evaluate, checksum, verify
        self._report, self._stopping, self._move, self._gradients = report, stopping, move, gradients
        self.scale = LossScale(dynamic=plan.compute_dtype == "float16")
        self.held_out: Points = ()
        self.tasks: dict[str, Points] = {}
        """(step, figure) of each evaluation, by task."""
        self.ended_early = ""
        """Why the run ended before its last step, as a sentence; empty for one that did not."""
        self._keeps = keeps or comm.rank == 0
        self._measure, self._rising, self._told_eager = measure, set[str](), False

    def train(self) -> bool:
        """Train from the newest checkpoint to the last step. False if asked to stop before that."""
        plan, train = self.plan, self.plan.spec.train
        step = self._resume()
        if self._gradients is None:
            self._capture_passes()
        if self._judged is None or (self._judged_at(step) and self._judged != step):
            self._judge(step)
            if step:  # it was killed in this evaluation
                self._note(step)
        while step < plan.steps and not self._ends_early():
            stop = self._step(step)
            step += 1
            if train.verify_steps and step % train.verify_steps == 0:
                self._report(Event(kind="verify", step=step, total_steps=plan.steps, note=self._verify()))
            # Saved first: an evaluation may take long, and a kill in it must not cost the steps before it.
            saved = stop or step == plan.steps or step % train.save_steps == 0
            if saved:
                self._save(step)
            if self._judged_at(step):
                self._judge(step)
                if saved:
                    self._note(step)
                elif self._is_best(step) or self._ends_early():
                    self._save(step)
            if stop and step < plan.steps:
                return False
        return True

    def _step(self, step: int) -> bool:
        """One optimizer step over the global batch; True if any rank was asked to stop."""
        plan, clock = self.plan, Stopwatch(self.comm.device)
        self._move("training", step + 1)  # data may hang, and this rank is to be named then, not one that waits for it
        batches = self.samples.step(step)
        learned = sum(map(self.samples.learned, batches))
        if learned == 0:
            raise JobError(f"no token of step {step + 1} has a loss", try_="a larger seq_len")
        own = range(self.place.data_rank, len(batches), plan.data_parallel)
        mine = [
            MicroBatch(
                partial(self._load, clock, batches[index], self._beside(batches, index), step, count, len(own)),
                micro_batch_seed(plan.spec.seed, step, index),
            )
            for count, index in enumerate(own, 1)
        ]
        # Tokens weigh the same wherever they are: each micro-batch is divided by the tokens of the whole step.
        total = self.engine.accumulate(
            mine, weight=1.0 / learned, loss_scale=self.scale.value, computed=partial(clock.mark, "computed")
        )
        clock.mark("accumulated")
        self._move("updating", step + 1)
        rate = learning_rate(plan.spec.optim, step=step, steps=plan.steps)
        result = self.engine.step(rate, self.scale.value)
        clock.mark("updated")
        loss, stops = self.comm.sum(total, float(self._stopping()))
        self._report(
            Event(
                kind="step",
                step=step + 1,
                total_steps=plan.steps,
                loss=loss / learned,
                learning_rate=rate,
                gradient_norm=result.gradient_norm,
                tokens=sum(map(self.samples.tokens, batches)),
                padding=sum(
                    self.samples.padding(each, self._beside(batches, index)) for index, each in enumerate(batches)
                ),
                own_tokens=sum(self.samples.tokens(batches[index]) for index in own),
                seconds=clock.total(),
                data_s=clock.data_s,
                busy_s=clock.between("began", "computed"),
                update_s=clock.between("accumulated", "updated"),
                skipped=result.skipped,
                note=self._note_of_step(skipped=result.skipped),
            )
        )
        self.scale.update(
            skipped=result.skipped, step=step + 1, loss=loss / learned, run=self.run, where=self._not_finite
        )
        self._check_gradients(step + 1, skipped=result.skipped, rate=rate)
        return stops > 0

    def _note_of_step(self, *, skipped: bool) -> str:
        """What a step has to say, once each: a loss scale that was too large, passes that cannot be captured."""
        notes = [f"loss scale {self.scale.value:g}"] if skipped else []
        reason = self.engine.replayed.refused if self.engine.replayed else ""
        if reason and not self._told_eager:
            self._told_eager = True
            notes.append(f"passes are launched kernel by kernel, not as CUDA graphs: {reason}")
        return "; ".join(notes)

    def _capture_passes(self) -> None:
        """Replay passes from now on: no hook has to see them any more."""
        if self.engine.replayed:
            self.engine.replayed.start()

    def _check_gradients(self, step: int, *, skipped: bool, rate: float) -> None:
        """Once two updates are done, end the run if a trained tensor had no gradient. Before the step is saved."""
        if self._gradients is not None and self._gradients.end_step(skipped=skipped, learning_rate=rate):
            watch, self._gradients = self._gradients, None
            self._capture_passes()
            note = watch.found(self.comm).words
            if self.comm.rank == 0:
                self._report(Event(kind="gradients", step=step, total_steps=self.plan.steps, note=note))

    def _not_finite(self) -> str:
        """In which tensors gradients of this step are not finite, while they are watched."""
        return self._gradients.not_finite(self.comm) if self._gradients is not None else ""

    def _beside(self, batches: list[list[int]], index: int) -> list[list[int]]:
        """The micro-batches that all ranks compute at a time, where they exchange weights meanwhile; else none.

        Of one shape they are all launched or all replayed, which NCCL wants of what ranks do together.
        """
        ranks = self.plan.data_parallel
        return batches[index - index % ranks :][:ranks] if self.place.in_step else []

    def _load(
        self, clock: Stopwatch, indices: list[int], beside: list[list[int]], step: int, count: int, of: int
    ) -> Mapping[str, torch.Tensor]:
        """Load a micro-batch, and report that the rank has reached it."""
        self._move("training", step + 1, count, of)
        with clock.data():
            return self.samples.batch(indices, beside)

    @property
    def _best(self) -> str:
        train = self.plan.spec.train
        return best_figure(train.best, train.tasks, holds_out=bool(self.samples.held_out))

    @property
    def _evaluates(self) -> bool:
        return bool(self.samples.held_out) or self._measure is not None

    @property
    def _judged(self) -> int | None:
        """The step of the last evaluation; None before the first."""
        return max((points[-1][0] for points in (self.held_out, *self.tasks.values()) if points), default=None)

    def _judged_at(self, step: int) -> bool:
        every = self.plan.spec.train.eval_steps
        return self._evaluates and (step == self.plan.steps or (every > 0 and step % every == 0))

    def _judge(self, step: int) -> None:
        """Evaluate the held-out loss and the tasks, on all ranks together."""
        if not self._evaluates:
            return
        self._move("evaluating", step)
        if self.engine.replayed:
            self.engine.replayed.make_room()  # a plan has room for either
        if self.samples.held_out:
            self._judge_held_out(step)
        if self._measure is not None:
            self._judge_tasks(step, self._measure)

    def _judge_tasks(self, step: int, measure: Measure) -> None:
        """Measure the tasks; all ranks come to the same figures."""
        for task, figure in measure(lambda done, of: self._move("evaluating", step, done, of)).items():
            self.tasks[task] = (*self.tasks.get(task, ()), (step, figure.value))
            if figure.more_is_better:
                self._rising.add(task)
            self._report(
                Event(
                    kind="eval",
                    step=step,
                    total_steps=self.plan.steps,
                    task=task,
                    figure=figure.value,
                    rises=figure.more_is_better,
                )
            )

    def _ends_early(self) -> bool:
        """Whether `train.patience` has ended the run with its last evaluation."""
        self.ended_early = reason_to_stop(
            self._best,
            points_of(self._best, self.held_out, self.tasks),
            rises=self._best in self._rising,
            patience=self.plan.spec.train.patience,
            steps=self.plan.steps,
        )
        return bool(self.ended_early)

    @property
    def outcome(self) -> Outcome:
        """How far a finished run came."""
        steps = self._judged or 0 if self.ended_early else self.plan.steps
        return Outcome(steps, self.held_out, self.tasks, self.ended_early)

    def settle(self) -> int:
        """The step whose adapter is the run's: the last one; of a run that ended early the best, which is loaded."""
        best = self._progress(self._judged or 0).best_step
        if not self.ended_early or best is None:
            return self.plan.steps
        self.engine.restore(checkpoint.load(self.run.checkpoint(best))[1])
        return best

    def _judge_held_out(self, step: int) -> None:
        """Evaluate the held-out loss, weighted by tokens over all ranks."""
        batches = self.samples.held_out_batches()
        mine = batches[self.place.data_rank :: self.plan.data_parallel]
        own = self._evaluate(mine, lambda count: self._move("evaluating", step, count, len(mine)))
        if self.place.in_step and len(mine) < -(-len(batches) // self.plan.data_parallel):
            self._evaluate(batches[:1], unseen)  # others have one more, and weights are gathered only by all together
        loss, tokens = self.comm.sum(*own)
        self.held_out = (*self.held_out, (step, loss / tokens))
        self._report(Event(kind="eval", step=step, total_steps=self.plan.steps, held_out_loss=loss / tokens))
        if step == 0 and not math.isfinite(loss):  # all ranks have the same sum, and end together
            raise before_training("the held-out loss", loss / tokens, fp16=self.scale.dynamic)

    def _is_best(self, step: int) -> bool:
        return bool(step and self._judged == step and self._progress(step).best_step == step)

    def _progress(self, step: int, *, optimizer_steps: int = 0) -> Progress:
        return Progress(
            step=step,
            samples=step * self.plan.spec.batch,
            optimizer_steps=optimizer_steps,
            loss_scale=self.scale.value,
            finite_steps=self.scale.finite_steps,
            held_out=self.held_out,
            tasks=self.tasks,
            best=self._best,
            rising=tuple(sorted(self._rising)),
        )

    def _save(self, step: int) -> Path:
        """Write a checkpoint, once all ranks with the same part have shown that they hold the same adapter."""
        self._move("saving", step)
        checksums, parts = self.comm.gather(self._checksum()), self.place.adapter_parts
        differing = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[rank % parts]]
        if differing:
            raise JobError(
                f"the adapter of rank(s) {differing} differs from that of the first {parts} rank(s) at step {step}",
                try_="--resume",
            )
        state = self.engine.state(wanted=self._keeps)
        if self._keeps:
            progress = self._progress(step, optimizer_steps=state.optimizer_steps)
            checkpoint.save(self.run, progress, state, keep=self.plan.spec.train.keep)
        if self.comm.rank == 0:
            self._report(Event(kind="checkpoint", step=step, total_steps=self.plan.steps))
        self.comm.barrier()
        return self.run.checkpoint(step)

    def _note(self, step: int) -> None:
        """Record a step's evaluation in its checkpoint."""
        if self._keeps:
            checkpoint.note(self.run, self._progress(step), keep=self.plan.spec.train.keep)

    def _require_one_start(self, step: int) -> None:
        """Raise RunError where ranks, of run directories of their own, would go on from different steps."""
        newest = self.comm.gather(step)
        if differing := [rank for rank, other in enumerate(newest) if other != newest[0]]:
            raise RunError(
                f"rank 0 has a checkpoint of step {newest[0]}, and rank {differing[0]} one of step "
                f"{newest[differing[0]]}: their nodes' run directories differ",
                try_=f"copy {self.run.checkpoints} of the node with the newest one to the others, and --resume",
            )

    def _resume(self) -> int:
        """Load the newest complete checkpoint; returns the step to resume from."""
        steps = self.run.checkpoint_steps()
        self._require_one_start(steps[-1] if steps else 0)
        if not steps:
            self._report(Event(kind="start", step=0, total_steps=self.plan.steps))
            return 0
        progress, state = checkpoint.load(self.run.checkpoint(steps[-1]))
        self.engine.restore(state)
        self.scale.value, self.scale.finite_steps = progress.loss_scale, progress.finite_steps
        self.held_out, self.tasks = progress.held_out, dict(progress.tasks)
        self._rising = set(progress.rising)
        if self._gradients is not None and progress.optimizer_steps >= UPDATES:  # they were checked then
            self._gradients.close()
            self._gradients = None
        if self._keeps:  # a killed run may have come no further than to write it
            checkpoint.prune(self.run, keep=self.plan.spec.train.keep, best=progress.best_step)
        self._report(Event(kind="resume", step=progress.step, total_steps=self.plan.steps))
        return progress.samples // self.plan.spec.batch
