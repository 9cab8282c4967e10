"""Refuses what a launch must not touch or cannot do, before anything is started, downloaded or created."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from qdist.core.errors import RunError, SpecError
from qdist.core.evaluation.words import TaskWord, task_words
from qdist.core.planning.disk import storage
from qdist.core.planning.plan import DataFacts, Plan, Prepared
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import OF_FILES
from qdist.core.text import command, format_bytes, resuming
from qdist.host.data.files import holds_records
from qdist.host.data.records import check_source
from qdist.host.data.sources import changed_sources
from qdist.host.evaluation.questions import read_questions
from qdist.host.files import cache_path, free_bytes, obstacle, require_space, unusable_cache
from qdist.host.launch.survey import counted
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import launcher_is_gone, state_of
from qdist.host.sources.model_folder import require_same_model, require_same_original

ELSEWHERE = "a --run folder that you may write to, on a disk with room"


def refuse_running(run: RunDir) -> None:
    """Raise RunError if ranks are running: their plan must not change."""
    if run.exists() and state_of(run) == "running":
        raise RunError(f"{run.path} is being trained by another process", try_=command("monitor", run.path))


def await_ranks(run: RunDir, say: Callable[[str], None], *, patience_s: float = 15.0) -> None:
    """Wait, up to `patience_s` seconds, for ranks whose launcher was killed: they are about to end."""
    if not run.exists() or state_of(run) != "running" or not launcher_is_gone(run):
        return
    say("waiting for the ranks of the launch before to end")
    end = time.monotonic() + patience_s
    while state_of(run) == "running" and time.monotonic() < end:
        time.sleep(0.1)


def refuse_used(run: RunDir, *, held: bool = False) -> None:
    """Raise RunError if a directory cannot take a new run. held: this process holds its lock."""
    if not held:
        refuse_running(run)
    if run.result() is not None:
        raise RunError(
            f"{run.path} holds a finished run",
            try_=f"another --run, or more steps: {resuming(run.path, '--steps', 'N')}",
        )
    if run.exists():
        steps = run.checkpoint_steps()
        where = f"a checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"
        raise RunError(
            f"{run.path} holds an unfinished run with {where}",
            try_=f"{resuming(run.path)}, or another --run",
        )
    if run.path.exists() and not (run.path.is_dir() and run.is_bare()):
        raise RunError(f"{run.path} exists and is not a run", try_="another --run")


def refuse_done(plan: Plan, run: RunDir) -> None:
    """Raise RunError if a run has done all steps of the new plan; a finished run resumes only for more steps.

    One that ended early resumes only with more patience, or none.
    """
    result, saved = run.result(), run.checkpoint_steps()
    if result is None:
        if saved and plan.steps < saved[-1]:
            more = resuming(run.path, "--steps", 2 * saved[-1])
            raise RunError(f"{run.path} has done {saved[-1]:,} steps, more than {plan.steps:,}", try_=more)
        return
    done, schedule = result.get("steps", run.plan().steps), plan.spec.optim.schedule
    finished = f"{run.path} is finished after {done:,} steps"
    if not saved:
        raise RunError(f"{finished}, and no checkpoint of it is left to go on from", try_="a new run")
    if why := result.get("ended_early"):
        _refuse_impatient(plan, run, why)
    elif schedule != "constant":
        raise RunError(f"{finished}: its {schedule} learning rate has ended with them", try_="a new run")
    if plan.steps <= done:
        more = resuming(run.path, "--steps", 2 * done)
        raise RunError(f"{finished}: it can only go on to more steps, not to {plan.steps:,}", try_=more)


def _refuse_impatient(plan: Plan, run: RunDir, why: str) -> None:
    """Raise RunError if a run that ended early would end again with the first look at its evaluations."""
    before, now = run.plan().spec.train.patience, plan.spec.train.patience
    if now and now <= before:
        raise RunError(
            f"{run.path} {why}; with train.patience={now} it would end again at once",
            try_=resuming(run.path, "--set", "train.patience=0"),
        )


def refuse_unreadable(words: Iterable[TaskWord]) -> None:
    """Raise DataError or SpecError for a task whose file is not there or cannot be read."""
    for word in words:
        if word.kind in OF_FILES:
            for part in word.argument.split(","):
                check_source(part)
            continue
        path = Path(word.argument).expanduser()
        if word.kind == "lm":
            if path.suffix in (".yaml", ".yml") and not path.is_file():
                raise SpecError(f"there is no file {word.argument}", try_="lm:TASK.yaml, or a name that lm_eval knows")
        elif word.argument and not (word.kind == "perplexity" and path.is_file() and not holds_records(path)):
            check_source(word.argument)
            if word.kind.startswith("mmlu") and path.is_file():
                read_questions(word.argument)


def refuse_tasks(spec: RunSpec) -> None:
    """Raise SpecError or DataError for tasks of a run that are not there or cannot be read."""
    refuse_unreadable(word for text in spec.train.tasks for word in task_words(text))


def refuse_unwritable(run: RunDir, *, probe: bool = False) -> None:
    """Raise RunError if a run directory is not writable. probe: see `obstacle`."""
    if why := obstacle(run.path, probe=probe):
        raise RunError(f"{run.path} cannot be written: {why}", try_=ELSEWHERE)


def refuse_unwritable_cache(*, probe: bool = False) -> None:
    """Raise MachineError if the cache is not writable. probe: see `obstacle`."""
    if why := obstacle(cache_path(), probe=probe):
        raise unusable_cache(why)


def refuse_small_disk(plan: Plan, run: RunDir) -> None:
    """Raise PlanError if a run's disk has no room for its checkpoints and adapter."""
    takes, there = storage(plan), sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    most = f"{takes.most_checkpoints} checkpoints" if takes.most_checkpoints > 1 else "a checkpoint"
    other = "make room there" if run.exists() else "a --run folder on another disk"
    enough = _keeping_one(plan) - there <= free_bytes(run.path)
    require_space(
        run.path,
        takes.total - there,
        purpose=f"keeping {most} of {format_bytes(takes.checkpoint)} and an adapter of {format_bytes(takes.adapter)}",
        try_=f"--set train.keep=1, or {other}" if enough else other,
    )


def refuse_other_files(old: Plan, run: RunDir) -> None:
    """Raise RunError if a run's model or data are known to differ from those it was started with."""
    if Path(old.source.path).is_dir():
        require_same_original(old.source, run=str(run.path))
    names = changed_sources(old.spec.data, old.data) if old.data else ()
    if names:
        records = counted(old.spec)
        raise _other_data(old, run, names, "other records now" if records is None else f"{sum(records):,} records now")


def of_the_same(old: Plan, prepared: Prepared, run: RunDir) -> Prepared:
    """The newly prepared files of a run, with a note if the same model was packed to different bytes.

    Raises RunError if its model or data are others than those it was started with.
    """
    require_same_model(old.source, prepared.source, run=str(run.path))
    refuse_other_data(old, prepared.data, run)
    if old.source.digest in ("", prepared.source.digest):
        return prepared
    note = "the same model was packed to other bytes than the run began with: by other versions, or on another device"
    return msgspec.structs.replace(prepared, notes=(*prepared.notes, note))


def refuse_other_data(old: Plan, now: DataFacts | None, run: RunDir) -> None:
    """Raise RunError if a run's data, tokenized again, differ from those it was started with."""
    if old.data is None or now is None or os.path.basename(now.path) == os.path.basename(old.data.path):
        return
    if old.data.digest and now.digest == old.data.digest:
        raise RunError(
            f"{old.spec.data.path} is as {run.path} was started with, and gives other tokens now: {_size(old.data)} "
            f"then, {_size(now)} now",
            try_="the versions of qdist and transformers in its versions.json, or a new run",
        )
    both = zip(old.data.parts, now.parts, strict=False)
    names = tuple(one.name for one, other in both if one.digest != other.digest)
    raise _other_data(old, run, names or (old.spec.data.path,), f"{_size(now)} now")


def _other_data(old: Plan, run: RunDir, names: tuple[str, ...], now: str) -> RunError:
    assert old.data is not None
    is_not = "is not" if len(names) == 1 else "are not"
    return RunError(
        f"{' and '.join(names)} {is_not} what {run.path} was started with: {_size(old.data)} then, {now}",
        try_="put the file back, or start a new run",
    )


def _size(data: DataFacts) -> str:
    return f"{data.samples:,} samples and {data.tokens:,} tokens"


def _keeping_one(plan: Plan) -> int:
    train = msgspec.structs.replace(plan.spec.train, keep=1)
    spec = msgspec.structs.replace(plan.spec, train=train)
    return storage(msgspec.structs.replace(plan, spec=spec)).total
