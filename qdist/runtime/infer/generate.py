"""Answers a file of prompts with a run's adapter or any model."""

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from qdist.core.data.conversation import Conversation
from qdist.core.errors import RunError
from qdist.core.requests import Generate
from qdist.host.data.records import read_prompts
from qdist.host.files import sync, unwritable, write_atomic, write_out
from qdist.host.opening import decoded, node_of, read_text
from qdist.host.progress import ProgressLine
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.terminal import say
from qdist.runtime.formats.work_folder import reserved
from qdist.runtime.infer.decoding import complete, text_of
from qdist.runtime.infer.load import open_model
from qdist.runtime.infer.prompts import Speech, encode_prompts, speech_of
from qdist.runtime.quantize.materialize import trust


def generate_file(
    target: str, prompts: Path, out: Path, *, max_new_tokens: int, batch: int, max_memory_bytes: int | None = None
) -> int:
    """Answer a file of prompts into JSONL; returns their number.

    `out` appears when all are answered. Answers are kept beside it as they come: killed, the same command goes on
    where it was.

    Raises RunError if `out` is there or cannot be written, DataError for prompts that cannot be answered, both
    before weights are read.
    """
    if node_of(out):  # a device or a pipe, beside which nothing can be kept
        with TemporaryDirectory() as folder:
            whole = Path(folder, "answers.jsonl")
            count = generate_file(
                target, prompts, whole, max_new_tokens=max_new_tokens, batch=batch, max_memory_bytes=max_memory_bytes
            )
            write_out(out, whole.read_text(encoding="utf-8"))
            return count
    with reserved(out):
        conversations = read_prompts(prompts)
        speech = speech_of(target)
        encoded = encode_prompts(conversations, speech)
        identity = [str(Path(target).resolve()), _stamp(target), encoded, max_new_tokens]
        kept = _Kept(out, hashlib.sha256(json.dumps(identity).encode()).hexdigest())
        if len(kept.answers) < len(encoded):
            _answer(target, speech, encoded, kept, max_new_tokens=max_new_tokens, batch=batch, cap=max_memory_bytes)
        lines = [
            json.dumps({"messages": _messages(own), "answer": kept.answers[index]}, ensure_ascii=False)
            for index, own in enumerate(conversations)
        ]
        with unwritable(out):
            write_atomic(kept.path, "\n".join(lines) + "\n")
            os.replace(kept.path, out)  # nothing is left beside it, whenever this process is killed
            sync(out.parent)
    return len(lines)


def _answer(
    target: str, speech: Speech, encoded: Sequence[list[int]], kept: "_Kept", *, max_new_tokens: int, batch: int,
    cap: int | None,
) -> None:  # fmt: skip
    """Answer the remaining prompts, longest first, so that running out of memory costs least."""
    order = sorted((i for i in range(len(encoded)) if i not in kept.answers), key=lambda index: -len(encoded[index]))
    most = _most_new(speech, encoded, max_new_tokens)
    tokens = batch * (max(map(len, encoded)) + most)
    opened = open_model(target, tokens=tokens, max_memory_bytes=cap, needs_tokenizer=True)
    for line in filter(None, (opened.where, speech.note)):
        say(line, err=True)
    if kept.answers:
        say(f"{len(kept.answers)} of {len(encoded)} answers are there already", err=True)
    with ProgressLine(len(encoded), "answered", done=len(kept.answers)) as progress:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            found = complete(
                opened.model, opened.tokenizer, [encoded[index] for index in chosen],
                max_new_tokens=_room(speech, [encoded[index] for index in chosen], max_new_tokens),
                end_text=speech.wording.end_text,
            )  # fmt: skip
            kept.add({index: text_of(opened.tokenizer, ids) for index, ids in zip(chosen, found, strict=True)})
            progress.advance(len(chosen))


def _room(speech: Speech, prompts: Sequence[list[int]], wanted: int) -> int:
    """New tokens that a batch has positions for."""
    return wanted if speech.positions is None else min(wanted, speech.positions - max(map(len, prompts)))


def _most_new(speech: Speech, encoded: Sequence[list[int]], wanted: int) -> int:
    """The most tokens that an answer may have; warns if positions end some of them earlier."""
    short = sum(_room(speech, [prompt], wanted) < wanted for prompt in encoded)
    if short:
        say(
            f"note: {short} of {len(encoded)} prompts leave fewer than {wanted} of the model's {speech.positions:,} "
            "positions: their answers are cut there",
            err=True,
        )
    return max(_room(speech, [prompt], wanted) for prompt in encoded)


class _Kept:
    """Answers stored on disk as they are generated, next to the final file.

    identity: of model, prompts and settings; answers to others are not taken over.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.path = out.with_name(f".{out.name}.unfinished")
        self.answers = _answers_in(self.path, identity)
        self._write("w", "\n".join([identity, *([json.dumps(self.answers)] if self.answers else [])]))

    def add(self, answers: dict[int, str]) -> None:
        """Store more answers. A kill during this leaves an unterminated line, which is not read."""
        self.answers |= answers
        self._write("a", json.dumps(answers))

    def _write(self, mode: str, text: str) -> None:
        with unwritable(self.path), open(self.path, mode, encoding="utf-8") as file:
            file.write(text + "\n")


def _answers_in(path: Path, identity: str) -> dict[int, str]:
    """The answers stored there; none if of another identity or if the file is damaged."""
    try:
        lines = read_text(path, RunError).split("\n")[:-1] if path.exists() else []
        found = [decoded(line.encode(), dict[int, str], str(path), RunError) for line in lines[1:]]
    except RunError:
        return {}
    return dict(chain.from_iterable(map(dict.items, found))) if lines[:1] == [identity] else {}


def _stamp(target: str) -> list[int]:
    """Distinguishes one training of a run from another."""
    run = RunDir(target)
    files = (run.path / PLAN, run.adapter / "adapter_model.safetensors")
    return [file.stat().st_mtime_ns for file in files if file.is_file()]


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.said} for turn in conversation.turns]


def run(request: Generate) -> None:
    """Answer the prompts and report how many there were."""
    if request.trust_remote_code:
        trust(request.run)
    count = generate_file(
        request.run,
        Path(request.prompts),
        Path(request.out),
        max_new_tokens=request.max_new_tokens,
        batch=request.batch,
        max_memory_bytes=request.max_memory_bytes,
    )
    say(f"{count} answers in {request.out}")
