"""Has a model answer prompts whose answers are known, and measures how near it comes: `generate:FILE`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from qdist.core.errors import RunError
from qdist.core.evaluation.predictions import Prediction
from qdist.core.evaluation.results import Figure, TaskResult
from qdist.core.evaluation.statistics import interval_of_mean, mean_of
from qdist.core.requests import Generate
from qdist.host.data.records import source_digest
from qdist.host.evaluation.overlap import ROUGE, Pair, corpus_bleu, figures_of_each, unread_letters
from qdist.host.evaluation.predictions import read_predictions
from qdist.host.files import unwritable, write_atomic
from qdist.host.run.rundir import RunDir
from qdist.host.tasks import run_task

FOLDER = "predictions"
"""Of a run, or here for a model that has none."""


def run_generate(
    request: Generate, *, folder: Path | None = None, answer: Callable[[Generate], Any] = run_task
) -> TaskResult:
    """ROUGE and BLEU of a model's greedy answers, which are written beside what was asked and expected.

    request: `prompts` are records that end with an answer; `out` is the file of predictions, or empty for one in
    `folder`, named for the data and everything else that decides the answers: it is used if it is there. Killed, the
    same request goes on where it was.
    folder: `predictions` in the run, or here for a model that has none, if it is not given.
    answer: has a `Generate` request answered; by default in a process of its own, or one on each GPU.

    Raises RunError if a named `out` is there, MachineError where ROUGE's or BLEU's library is missing, and what
    `qdist generate` does.
    """
    out = Path(request.out) if request.out else _usual_place(request, folder)
    if request.out and out.exists():
        raise RunError(f"{out} exists", try_="another file")
    if not out.exists():
        figures_of_each([Pair("a", "a")])  # what is missing is told before hours of answering
        answers = out.with_name(f".{out.stem}.answers.jsonl")
        with unwritable(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            answers.unlink(missing_ok=True)
        answer(replace(request, references=True, out=str(answers)))
        with unwritable(out):
            write_atomic(out, "".join(f"{line}\n" for line in _scored(read_predictions(answers))))
        answers.unlink()
    found = result_of(f"generate:{request.prompts}", read_predictions(out), most_new=request.sampling.max_new_tokens)
    return replace(found, notes=(*found.notes, f"predictions: {out}"))


def _usual_place(request: Generate, folder: Path | None) -> Path:
    """A file of its own for everything that decides the answers."""
    run = RunDir(request.run)
    settings = (request.adapter, request.sampling, request.limit, request.dtype, request.engine, request.beams)
    target, data = str(Path(request.run).resolve()), source_digest(request.prompts)
    identity = [target, run.training_stamp(), data, msgspec.to_builtins(settings)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    usual = run.path / FOLDER if run.exists() else Path(FOLDER)
    which = request.adapter if run.exists() else Path(request.run).name
    return (folder or usual) / f"{Path(request.prompts).stem}-{'adapter' if which == 'run' else which}-{digest}.jsonl"


def _scored(predictions: Sequence[Prediction]) -> list[str]:
    """The lines of a file of predictions, each with its own figures."""
    figures = figures_of_each([Pair(own.reference, own.prediction) for own in predictions])
    found = (replace(own, figures=mine) for own, mine in zip(predictions, figures, strict=True))
    return [msgspec.json.encode(own).decode() for own in found]


def result_of(task: str, predictions: Sequence[Prediction], *, most_new: int) -> TaskResult:
    """Mean ROUGE and the BLEU of all predictions together. Needs one, and the figures of each."""
    pairs = [Pair(own.reference, own.prediction) for own in predictions]
    means = (_mean(name, [own.figures[name] for own in predictions]) for name in ROUGE)
    return TaskResult(
        task=task, figures=(*means, corpus_bleu(pairs)),
        outcomes=tuple(own.figures[ROUGE[0]] for own in predictions), settings={"max_new_tokens": most_new},
        notes=tuple(_notes(predictions, pairs, most_new)),
    )  # fmt: skip


def _mean(name: str, values: Sequence[float]) -> Figure:
    sure = interval_of_mean(values)
    return Figure(name=name, value=mean_of(values), count=len(values), low=sure and sure.low, high=sure and sure.high)


def _notes(predictions: Sequence[Prediction], pairs: Sequence[Pair], most_new: int) -> list[str]:
    counts = (
        (
            sum(own.finish == "length" for own in predictions),
            f"answers were cut at {most_new:,} tokens or the model's end",
        ),
        (sum(not own.prediction.strip() for own in predictions), "answers are empty"),
        (unread_letters(pairs), "references are in letters that ROUGE does not count: see BLEU"),
    )
    return [f"{count:,} of {len(pairs):,} {what}" for count, what in counts if count]
