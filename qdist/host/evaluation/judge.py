"""Has a model behind an address judge answers; verdicts are written as they come, and never asked for twice."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

import msgspec

from qdist.core.errors import DataError, RunError, SpecError
from qdist.core.evaluation.judging import (
    MOST_NEW_TOKENS,
    Asking,
    JudgeSettings,
    Verdict,
    elo_result,
    grade_askings,
    grade_in,
    grade_result,
    pair_askings,
    pair_result,
    said_in,
    settle,
)
from qdist.core.evaluation.predictions import Prediction
from qdist.core.evaluation.results import TaskResult
from qdist.host.evaluation.endpoint import KEY, Endpoint
from qdist.host.evaluation.predictions import read_games, read_predictions
from qdist.host.files import locked, unwritable
from qdist.host.opening import decoded, read_bytes
from qdist.host.progress import ProgressLine
from qdist.host.terminal import say

_BEGINNING = b'{"key":"'
"""Of a line of verdicts."""


def run_judge(argument: str, settings: JudgeSettings, *, out: Path | None = None) -> TaskResult:
    """What a judge finds of files of predictions: one is graded, of several the answers are compared pair by pair.

    argument: the files, with commas between. out: where verdicts are written, and read to go on; beside the first file
    otherwise.
    Raises SpecError without --judge-model, DataError for files that do not hold the same questions, RunError if all
    that the limit allows is asked and nothing can be said yet, and what `Endpoint.ask` does.
    """
    paths = [Path(part).expanduser() for part in argument.split(",") if part]
    if settings.judge_model is None:
        raise SpecError("judge: asks a model, and none is named", try_="--judge-model NAME")
    files = _read(paths)
    names = list(files)
    askings = grade_askings(names[0], files[names[0]]) if len(files) == 1 else pair_askings(files)
    place = out or paths[0].with_name("-".join((paths[0].stem, "verdicts")) + ".jsonl")
    with Endpoint(settings.judge_url, settings.judge_model, key=os.environ.get(KEY, "")) as endpoint:
        verdicts = ask_all(askings, endpoint, settings, place)
    return _result(f"judge:{argument}", names, verdicts, len(askings), settings, place)


def run_elo(argument: str) -> TaskResult:
    """The ratings of models in files of pairwise verdicts. argument: the files, with commas between."""
    games, silent = read_games([Path(part).expanduser() for part in argument.split(",") if part])
    found = elo_result(f"elo:{argument}", games)
    notes = (f"{silent} records have no verdict and are left out",) if silent else ()
    return msgspec.structs.replace(found, notes=(*notes, *found.notes))


def ask_all(askings: Sequence[Asking], endpoint: Endpoint, settings: JudgeSettings, out: Path) -> list[Verdict]:
    """The verdicts on askings, as many as the limits allow, in their order; those in `out` are taken from there."""
    keys = [_key(asking, settings) for asking in askings]
    with _adding(out) as (file, known):
        missing = {key: asking for key, asking in zip(keys, askings, strict=True) if key not in known}
        if known and len(missing) < len(askings):
            say(f"{len(askings) - len(missing)} of {len(askings)} verdicts are there already", err=True)
        with ProgressLine(len(askings), "judged", done=len(askings) - len(missing)) as progress:
            for verdict in _asked(missing, endpoint, settings):
                with unwritable(out):
                    file.write(msgspec.json.encode(verdict).decode() + "\n")
                    file.flush()
                known[verdict.key] = verdict
                progress.advance(1)
    return [known[key] for key in keys if key in known]


def _asked(missing: Mapping[str, Asking], endpoint: Endpoint, settings: JudgeSettings) -> Iterator[Verdict]:
    """Verdicts as they come, until a limit is reached.

    Behind an error no request is begun, and those at work are still heard, since they are paid for.
    """
    waiting = iter(list(missing.items())[: settings.judge_limit])
    spent, failed, at_work = 0, list[BaseException](), set[Future[Verdict]]()
    with ThreadPoolExecutor(settings.judge_workers) as pool, _stopping(endpoint):
        while True:
            has_room = not failed and (settings.judge_tokens is None or spent < settings.judge_tokens)
            free = settings.judge_workers - len(at_work) if has_room else 0
            at_work |= {pool.submit(_verdict, key, asking, endpoint) for key, asking in islice(waiting, free)}
            if not at_work:
                break
            done, at_work = wait(at_work, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    failed.append(error)
                else:
                    spent += future.result().tokens
                    yield future.result()
    if failed:
        raise failed[0]


@contextmanager
def _stopping(endpoint: Endpoint) -> Iterator[None]:
    """Have threads that wait for a busy server give up when this block ends early, as by Ctrl-C."""
    try:
        yield
    except BaseException:
        endpoint.stop()
        raise


def _verdict(key: str, asking: Asking, endpoint: Endpoint) -> Verdict:
    said = endpoint.ask(asking.system, asking.text, max_new_tokens=MOST_NEW_TOKENS)
    paired = len(asking.names) == 2
    return Verdict(
        key=key, question=asking.question, names=asking.names, said=said_in(said.text) if paired else None,
        grade=None if paired else grade_in(said.text), text=said.text, tokens=said.tokens,
    )  # fmt: skip


def _key(asking: Asking, settings: JudgeSettings) -> str:
    identity = [settings.judge_url, settings.judge_model, asking.names, asking.question, asking.system, asking.text]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@contextmanager
def _adding(out: Path) -> Iterator[tuple[TextIO, dict[str, Verdict]]]:
    """A file to add lines to, kept from other processes, with the verdicts that it has."""
    with ExitStack() as stack:
        with unwritable(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out, busy=f"another process is adding verdicts to {out}"))
        known = _written(out)
        with unwritable(out):
            file = stack.enter_context(out.open("a", encoding="utf-8"))
        try:
            yield file, known
        finally:
            if not out.stat().st_size:  # nothing was said, and an empty file would be in the way
                out.unlink()


def _written(out: Path) -> dict[str, Verdict]:
    """The verdicts of a file. A line that a kill left unterminated is cut off; of another file nothing is."""
    whole = read_bytes(out, RunError)
    complete, tail = whole[: whole.rfind(b"\n") + 1], whole[whole.rfind(b"\n") + 1 :]
    try_ = "another file for verdicts"
    lines = complete.splitlines()
    found = [decoded(line, Verdict, f"{out}, line {n}", RunError, try_=try_) for n, line in enumerate(lines, 1)]
    if not tail.startswith(_BEGINNING[: len(tail)]):
        raise RunError(f"{out} is not a file of verdicts", try_=try_)
    os.truncate(out, len(complete))
    return {verdict.key: verdict for verdict in found}


def _read(paths: Sequence[Path]) -> dict[str, list[Prediction]]:
    """The predictions of each file by its name. Raises DataError for files of different questions."""
    if not paths:
        raise DataError("judge: names no file", try_="judge:FILE_A,FILE_B")
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise DataError(f"{paths[0]} is named twice", try_="files of different models")
    files = {name: read_predictions(path) for name, path in zip(names, paths, strict=True)}
    first, *others = files.values()
    for name, other in zip(names[1:], others, strict=True):
        apart = next((n for n, (a, b) in enumerate(zip(first, other, strict=False)) if a.prompt != b.prompt), None)
        if apart is not None or len(first) != len(other):
            what = (
                f"line {apart + 1} asks something else"
                if apart is not None
                else f"{len(other)} lines, not {len(first)}"
            )
            raise DataError(
                f"{name} and {names[0]} do not answer the same questions: {what}",
                try_="generate:FILE of one FILE by both",
            )
    return files


def _result(
    task: str, names: Sequence[str], verdicts: Sequence[Verdict], wanted: int, settings: JudgeSettings, place: Path
) -> TaskResult:
    """What the verdicts amount to, with a note where a limit left some out."""
    told = {"judge": settings.judge_model or ""}
    left, again = wanted - len(verdicts), "the same command again, which goes on"
    way = again if left else "--judge-model with a model that ends its verdict as it is told to"
    if len(names) == 1:
        if not any(own.grade is not None for own in verdicts):
            raise RunError(f"none of {len(verdicts)} verdicts in {place} has a grade", try_=way)
        found = grade_result(task, verdicts, settings=told)
    else:
        settled = settle(verdicts, names)
        if not any(game.first == names[0] for game in settled.games):
            raise RunError(f"none of {len(verdicts)} verdicts in {place} makes a comparison of {names[0]}", try_=way)
        found = pair_result(task, names, settled, settings=told)
    limited = (f"{left} of {wanted} verdicts were not asked for, by the limit; {again}",) if left else ()
    return msgspec.structs.replace(found, notes=(*limited, *found.notes, f"verdicts: {place}"))
