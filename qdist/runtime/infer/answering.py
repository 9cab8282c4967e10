"""Answers many prompts in one process: all at once by an answerer, or batch by batch by transformers' beam search."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import msgspec

from qdist.core.errors import QdistError
from qdist.core.requests import Generate
from qdist.core.sampling import Sampling
from qdist.host.run.rundir import RunDir
from qdist.runtime.infer.answerer import Answerer, Ended, Listener, Piece, Question
from qdist.runtime.infer.decoding import complete, text_of
from qdist.runtime.infer.kept import Answered
from qdist.runtime.infer.load import open_model
from qdist.runtime.infer.prompts import Speech
from qdist.runtime.infer.ready import open_answerer

Keep = Callable[[dict[int, Answered]], None]
"""Stores answers by their numbers."""
ADAPTER = "adapter"
"""The name of a run's own adapter, in an answerer that has no other."""


class Asked(NamedTuple):
    """A prompt and how to answer it."""

    number: int
    prompt: list[int]
    sampling: Sampling


class Work(NamedTuple):
    """What one process is to answer."""

    request: Generate
    speech: Speech
    asked: Sequence[Asked]
    """In the order in which to begin."""
    longest: int
    """The most tokens of a prompt and its answer together."""


def answer_all(work: Work, keep: Keep, opened: Callable[[str], None] = lambda where: None) -> None:
    """Answer everything. opened: called once the model is loaded, with where it lies."""
    if not work.asked:
        return
    if work.request.beams > 1:
        _search(work, keep, opened)
        return
    request, name = work.request, adapter_of(work.request.run)
    ready = open_answerer(
        {name: request.run}, slots=min(request.batch, len(work.asked)), tokens=work.longest, engine=request.engine,
        max_memory_bytes=request.max_memory_bytes, dtype=request.dtype, ahead=(request.sampling,),
    )  # fmt: skip
    opened(ready.where)
    answer_with(ready.answerer, "" if request.adapter == "base" else name, work, keep)


def adapter_of(target: str) -> str:
    """The name under which a run's adapter is opened; empty for a model, which has none."""
    return ADAPTER if RunDir(target).exists() else ""


def answer_with(
    answerer: Answerer, adapter: str, work: Work, keep: Keep, clock: Callable[[], float] = time.monotonic
) -> None:
    """Put all prompts into an answerer's line, and step until all are answered. Raises the error that ended one."""
    began, errors = clock(), list[QdistError]()

    def elapsed_s() -> float:
        return clock() - began

    for own in work.asked:
        question = Question(own.prompt, ended_alike(own.sampling, work.speech, adapter), adapter)
        answerer.submit(question, _listener(own.number, keep, elapsed_s, errors))
    while answerer.step() and not errors:
        pass
    if errors:
        raise errors[0]


def ended_alike(sampling: Sampling, speech: Speech, adapter: str) -> Sampling:
    """Sampling with which the base alone, asked in the wording of a run, ends its answers where the adapter would."""
    end_text = speech.wording.end_text
    if adapter or not end_text or end_text in sampling.stop:
        return sampling
    return msgspec.structs.replace(sampling, stop=(*sampling.stop, end_text))


def _listener(number: int, keep: Keep, elapsed_s: Callable[[], float], errors: list[QdistError]) -> Listener:
    """Hears the tokens of one answer, and keeps it when it has ended, or the error that ended it."""
    texts: list[str] = []

    def heard(told: Piece | Ended) -> None:
        texts.append(told.text)
        if isinstance(told, Ended) and told.error:
            errors.append(told.error)
        elif isinstance(told, Ended):
            found = Answered(
                text="".join(texts).strip(), prompt_tokens=told.prompt_tokens, new_tokens=told.new_tokens,
                finish=told.reason, after_s=elapsed_s(),
            )  # fmt: skip
            keep({number: found})

    return heard


def _search(work: Work, keep: Keep, opened: Callable[[str], None]) -> None:
    """Answer by beam search, a batch of prompts after the other."""
    request, size = work.request, work.request.batch
    loaded = open_model(
        request.run, dtype=request.dtype, tokens=size * request.beams * work.longest,
        max_memory_bytes=request.max_memory_bytes, needs_tokenizer=True,
    )  # fmt: skip
    opened(loaded.where)
    began = time.monotonic()
    alone = request.adapter == "base" and RunDir(request.run).exists()
    with loaded.model.disable_adapter() if alone else nullcontext():
        for start in range(0, len(work.asked), size):
            chosen = work.asked[start : start + size]
            most = min(own.sampling.max_new_tokens for own in chosen)
            most = min(most, work.longest - max(len(own.prompt) for own in chosen))
            found = complete(
                loaded.model, loaded.tokenizer, [own.prompt for own in chosen], max_new_tokens=most,
                end_text=work.speech.wording.end_text, stop=request.sampling.stop, num_beams=request.beams,
                repetition_penalty=request.sampling.repetition_penalty,
            )  # fmt: skip
            after_s = time.monotonic() - began
            keep({
                own.number: Answered(
                    text=text_of(loaded.tokenizer, ids), prompt_tokens=len(own.prompt), new_tokens=len(ids),
                    finish="length" if len(ids) == most else "stop", after_s=after_s,
                )
                for own, ids in zip(chosen, found, strict=True)
            })  # fmt: skip
