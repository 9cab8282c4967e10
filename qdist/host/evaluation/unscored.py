"""Measures what tasks ask that is no probability: generated answers, a judge's verdicts, and ratings."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.evaluation.results import Evaluation, TaskResult, What
from qdist.core.requests import Generate
from qdist.core.spec.sections import OF_MODELS
from qdist.host.evaluation.generation import FOLDER, run_generate
from qdist.host.evaluation.judge import run_elo, run_judge
from qdist.host.run.rundir import RunDir
from qdist.host.tasks import run_task


class Model(NamedTuple):
    """One of the models that answer."""

    target: str
    """The run or model, as it was named."""
    what: What
    opened: str
    """What is opened: the run for its adapter and its base, else a model, such as the run's merged one."""
    step: int | None = None
    """Of the adapter's checkpoint."""
    reading: Reading = AS_FOUND
    """How records are read, as in the run's training."""


def evaluate_models(
    tasks: Sequence[tuple[str, str]], models: Sequence[Model], usual: Generate, *,
    answer: Callable[[Generate], Any] = run_task,
) -> Iterator[Evaluation]:  # fmt: skip
    """What each model answers to the files of `generate` tasks, an evaluation a model; others are not looked at.

    tasks: kind and argument of each. usual: the request but for its model and its files.
    """
    files = [argument for kind, argument in tasks if kind in OF_MODELS]
    for model in models if files else ():
        run = RunDir(model.target)
        adapter: Literal["run", "base"] = "base" if model.what == "base" else "run"
        request = replace(usual, run=model.opened, adapter=adapter, out="", reading=model.reading)
        folder = run.path / FOLDER if run.exists() else None

        def measure(file: str, request: Generate = request, folder: Path | None = folder) -> TaskResult:
            return run_generate(replace(request, prompts=file), folder=folder, answer=answer)

        yield _evaluation(model.target, model.what, [_timed(measure, file) for file in files], model.step)


def evaluate_files(tasks: Sequence[tuple[str, str]], judge: JudgeSettings) -> Iterator[Evaluation]:
    """What a judge finds of files, and the ratings of those that are there, an evaluation a task."""
    for kind, argument in tasks:
        if kind == "judge":
            yield _evaluation(argument, "model", [_timed(lambda files: run_judge(files, judge), argument)])
        elif kind == "elo":
            yield _evaluation(argument, "model", [_timed(run_elo, argument)])


def _timed(measure: Callable[[str], TaskResult], argument: str) -> TaskResult:
    began = time.monotonic()
    return replace(measure(argument), seconds=time.monotonic() - began)


def _evaluation(target: str, what: What, results: Sequence[TaskResult], step: int | None = None) -> Evaluation:
    return Evaluation(target=target, what=what, results=tuple(results), step=step, time=time.time())
