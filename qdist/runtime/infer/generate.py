"""Answers a file of prompts with a run's adapter or any model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec

from qdist.core.data.conversation import Conversation
from qdist.core.evaluation.predictions import Exchange
from qdist.core.requests import Generate
from qdist.host.data.records import read_prompts
from qdist.host.evaluation.predictions import read_exchanges
from qdist.host.files import write_out
from qdist.host.opening import node_of
from qdist.host.progress import ProgressLine
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say
from qdist.runtime.formats.work_folder import reserved
from qdist.runtime.infer.answering import Asked, Work, answer_all
from qdist.runtime.infer.copies import Copy, answer_in_copies, copies_for, dealt
from qdist.runtime.infer.kept import Answered, Closing, Kept, closing
from qdist.runtime.infer.prompts import Speech, encode_prompts, speech_of
from qdist.runtime.quantize.materialize import trust


def run(request: Generate) -> None:
    """Answer the prompts, and report how many there were and how long it took; or a share of them, silently."""
    if request.trust_remote_code:
        trust(request.run)
    if request.share:
        answer_share(request)
    else:
        say(f"{generate_file(request)}: {request.out}")


def generate_file(request: Generate, copies: Sequence[Copy] | None = None) -> Closing:
    """Answer a file of prompts into JSONL.

    `out` appears when all are answered. Answers are kept beside it as they come: killed, the same command goes on
    where it was.
    copies: processes to answer in; by default one for each GPU that is worth one.

    Raises RunError if `out` is there or cannot be written, DataError for prompts that cannot be answered, both
    before weights are read.
    """
    out = Path(request.out)
    if node_of(out):  # a device or a pipe, beside which nothing can be kept
        with TemporaryDirectory() as folder:
            whole = Path(folder, "answers.jsonl")
            found = generate_file(msgspec.structs.replace(request, out=str(whole)), copies)
            write_out(out, whole.read_text(encoding="utf-8"))
            return found
    with reserved(out):
        job = _job_of(request)
        kept = Kept(out, job.identity)
        kept.gather()
        before = kept.answers
        if order := _order(job, before):
            _tell_of_positions(job)
            _answer(job, kept, order, copies)
            kept.gather()
        kept.publish(out, _lines(job, kept))
    return closing(before, kept.answers)


def answer_share(request: Generate) -> None:
    """Answer the share of a request that is this process's, into its part of what is kept."""
    job = _job_of(request)
    kept = Kept(Path(request.out), job.identity)
    kept.read()
    number, count = request.share or (0, 1)
    with kept.adding(number) as adding:
        answer_all(_work(job, dealt(_order(job, kept.answers), number, count)), adding.add)


class _Job(NamedTuple):
    """What there is to answer."""

    request: Generate
    conversations: Sequence[Conversation]
    speech: Speech
    encoded: Sequence[list[int]]
    identity: str
    """Of everything that decides the answers."""
    references: Sequence[str] = ()
    """The answers that the data has; empty if they were not asked for."""

    @property
    def most_new(self) -> int:
        """The most tokens that an answer may have."""
        return max(self.room(prompt) for prompt in self.encoded)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return max(len(prompt) + self.room(prompt) for prompt in self.encoded)

    def room(self, prompt: Sequence[int]) -> int:
        """New tokens that a prompt has positions for."""
        wanted, positions = self.request.sampling.max_new_tokens, self.speech.positions
        return wanted if positions is None else min(wanted, positions - len(prompt))


def _job_of(request: Generate) -> _Job:
    exchanges = _exchanges(request)
    conversations = [own.prompt for own in exchanges]
    references = [own.reference for own in exchanges] if request.references else []
    speech = speech_of(request.run)
    encoded = encode_prompts(conversations, speech)
    settings = (request.sampling, request.n, request.beams, request.adapter, request.engine, request.dtype)
    identity = [
        str(Path(request.run).resolve()),
        RunDir(request.run).training_stamp(),
        encoded,
        msgspec.to_builtins(settings),
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return _Job(request, conversations, speech, encoded, digest, references)


def _exchanges(request: Generate) -> list[Exchange]:
    """What is asked, with the answers that the data has if those are wanted."""
    if request.references:
        return read_exchanges(request.prompts, limit=request.limit, reading=request.reading)
    return [Exchange(prompt, "") for prompt in read_prompts(Path(request.prompts), reading=request.reading)]


def _order(job: _Job, there: Any) -> list[int]:
    """Numbers of the answers that are not there yet, longest prompt first: running out of memory costs least then."""
    count = len(job.encoded) * job.request.n
    missing = (number for number in range(count) if number not in there)
    return sorted(missing, key=lambda number: -len(job.encoded[number // job.request.n]))


def _work(job: _Job, numbers: Sequence[int]) -> Work:
    """What one process is to answer."""
    request, count = job.request, job.request.n
    asked = [Asked(number, job.encoded[number // count], request.sampling.again(number % count)) for number in numbers]
    return Work(request, job.speech, asked, job.longest)


def _answer(job: _Job, kept: Kept, order: Sequence[int], copies: Sequence[Copy] | None) -> None:
    """Answer in this process, or in several."""
    request, total = job.request, len(job.encoded) * job.request.n
    if kept.answers:
        say(f"{len(kept.answers)} of {total} answers are there already", err=True)
    chosen = copies_for(request, job.longest, len(order)) if copies is None else copies
    with ProgressLine(total, "answered", done=len(kept.answers)) as progress:
        if len(chosen) > 1:
            answer_in_copies(request, chosen, kept, progress.advance)
            return
        with kept.adding(0) as adding:

            def keep(answers: dict[int, Answered]) -> None:
                adding.add(answers)
                progress.advance(len(answers))

            def opened(where: str) -> None:
                for line in filter(None, (where, job.speech.note)):
                    say(line, err=True)
                progress.restart()

            answer_all(_work(job, order), keep, opened)


def _tell_of_positions(job: _Job) -> None:
    """Say if the model's positions end some answers earlier."""
    wanted, count = job.request.sampling.max_new_tokens, len(job.encoded)
    if short := sum(job.room(prompt) < wanted for prompt in job.encoded):
        say(
            f"note: {short} of {count} prompts leave fewer than {wanted} of the model's {job.speech.positions:,} "
            "positions: their answers are cut there",
            err=True,
        )


def _lines(job: _Job, kept: Kept) -> list[str]:
    """The final file: a line a prompt."""
    count = job.request.n
    expected: list[dict[str, str]] = [{"reference": own} for own in job.references] or [{}] * len(job.conversations)
    return [
        _line(own, [kept.answers[index * count + draw] for draw in range(count)], expected[index])
        for index, own in enumerate(job.conversations)
    ]


def _line(conversation: Conversation, answers: Sequence[Answered], expected: Mapping[str, str]) -> str:
    """A prompt with its answer and what that took, or with lists of them if there are several.

    expected: the reference, if there is one.
    """
    messages = [{"role": turn.role, "content": turn.said} for turn in conversation.turns]
    first, tokens = answers[0], answers[0].prompt_tokens
    if len(answers) == 1:
        told: dict[str, Any] = {
            "answer": first.text, "prompt_tokens": tokens, "new_tokens": first.new_tokens, "finish": first.finish,
        }  # fmt: skip
    else:
        told = {
            "answers": [own.text for own in answers],
            "prompt_tokens": tokens,
            "new_tokens": [own.new_tokens for own in answers],
            "finish": [own.finish for own in answers],
        }
    return json.dumps({"messages": messages, **told, **expected}, ensure_ascii=False)
