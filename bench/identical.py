"""Are greedy answers the same, token by token, however a model is asked? In float32 on a CPU.

    python bench/identical.py RUN PROMPTS.jsonl [--tokens 48] [--prompts 80] [--exact QA_RUN MERGED]

PROMPTS: a question in the field `text` a line. The reference is transformers' own `generate` over `qdist.load`'s model,
a prompt at a time; --generated N: of the first N, and of the others the likeliest tokens of one pass over each answer,
which makes them the greedy answer as well. Compared to it: answers by rows of one cache, alone and 16 at a time; joined
at random times; one by one; and of `qdist serve`, with 8 of OpenAI's clients at once. --exact: a QA-LoRA run beside the
checkpoint that `qdist merge` wrote of it. Of answers that differ it prints the first token that does, and by how much
the two logits are apart there.
"""

import argparse
import asyncio
import gc
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import torch

import qdist
from qdist.core.data.conversation import Conversation, Turn
from qdist.core.sampling import Sampling
from qdist.runtime.infer.answerer import Answerer, Ended, Piece, Question
from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.decoding import ends_of
from qdist.runtime.infer.line import Line
from qdist.runtime.infer.one_by_one import OneByOne
from qdist.runtime.infer.prompts import encode_prompts, speech_of
from qdist.runtime.infer.ready import open_answerer
from qdist.runtime.infer.text import AnswerText, Script

NAME, SLOTS, CLIENTS, POSITIONS = "run", 16, 8, 512


class Asked(NamedTuple):
    """What everybody is asked."""

    texts: list[str]
    prompts: list[list[int]]
    tokens: int

    def first(self, count: int) -> "Asked":
        """The first prompts alone."""
        return Asked(self.texts[:count], self.prompts[:count], self.tokens)


class Heard:
    """A listener that keeps an answer."""

    def __init__(self) -> None:
        self.tokens, self.text, self.ended = list[int](), "", False

    def __call__(self, news: Piece | Ended) -> None:
        self.text += news.text
        if isinstance(news, Ended):
            self.ended = True
        else:
            self.tokens.append(news.token)


def read(run: str, file: Path, count: int, tokens: int) -> Asked:
    """The prompts, worded as in training."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:count]]
    asked = [Conversation(turns=(Turn("user", text, False),), where=f"prompt {n}") for n, text in enumerate(texts, 1)]
    return Asked(texts, encode_prompts(asked, speech_of(run)), tokens)


def sampling(asked: Asked) -> Sampling:
    """Greedy, without an end before so many tokens, so that all have as many to compare."""
    return Sampling(max_new_tokens=asked.tokens, ignore_end=True)


def by_generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own loop."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


def logits_of(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Logits [answer + 1, vocabulary] behind the prompt and each of its answer's tokens, by one pass."""
    logits: torch.Tensor = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :].float()
    return logits


def tokens_of(heard: Sequence[Heard]) -> list[list[int]]:
    """The tokens of answers."""
    return [own.tokens for own in heard]


def answers(answerer: Answerer, asked: Asked, *, joining: bool = False, adapter: str = NAME) -> list[Heard]:
    """All answers, asked at once; joining: one now and then."""
    drawn, heard = random.Random(0), [Heard() for _ in asked.prompts]
    waiting = list(zip(asked.prompts, heard, strict=True))
    more = True
    while more or waiting:
        for prompt, listener in waiting[: drawn.choice((0, 0, 0, 1, 2)) if joining else len(waiting)]:
            answerer.submit(Question(prompt, sampling(asked), adapter), listener)
            waiting.remove((prompt, listener))
        more = answerer.step()
    assert all(own.ended for own in heard)
    return heard


def one_by_one(model: Any, tokenizer: Any, asked: Asked) -> list[Heard]:
    """By the answerer for models that no decoder of rows takes, over the layers as they were loaded."""
    base, script = model.get_base_model(), Script(tokenizer)
    chooser = Chooser(1, base.get_output_embeddings().out_features, base.device)
    line = Line({NAME: script}, POSITIONS)
    return answers(OneByOne(base, chooser, line, slots=1, select=lambda _: None), asked)


@contextmanager
def serving(run: str) -> Iterator[str]:
    """`qdist serve` on a free port; its address."""
    words = ["serve", f"{NAME}={run}", "--port", "0", "--slots", str(SLOTS), "--context", str(POSITIONS)]
    server = subprocess.Popen([sys.executable, "-m", "qdist", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"http://\S+/v1", line):
                yield found[0]
                return
        raise SystemExit("the server ended while it was started")
    finally:
        server.terminate()
        server.wait(60)


async def served(address: str, asked: Asked) -> list[str]:
    """The texts of the answers, by clients of OpenAI's."""
    found, line = [""] * len(asked.texts), iter(range(len(asked.texts)))

    async def one_client() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=900) as client:
            for place in line:
                said = await client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": asked.texts[place]}],
                    max_tokens=asked.tokens,
                    temperature=0,
                )
                found[place] = said.choices[0].message.content or ""

    await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    return found


def script_of(model: Any, run: str) -> Script:
    """What ends the answers of a run."""
    speech = speech_of(run)
    return Script(speech.tokenizer, {*ends_of(model, speech.tokenizer), *speech.wording.ends}, speech.wording.end_text)


def text_of(tokens: Sequence[int], script: Script) -> str:
    """The text of an answer that ends where its run's answers do."""
    text, found = AnswerText(script.tokenizer, (script.end_text,)), ""
    for token in tokens:
        if token in script.ends:
            break
        found += text.add(token)
    return found + text.finish()


class Report:
    """Prints how many answers are the reference's, and where others part from it."""

    def __init__(self, model: Any, asked: Asked) -> None:
        self._model, self._asked = model, asked

    def compare(self, way: str, wanted: Sequence[list[int]], work: Callable[[], Sequence[list[int]]]) -> None:
        """Do the work, and print a line for it and one for each answer that differs."""
        begin = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - begin
        pairs = list(zip(wanted, found, strict=False))
        print(f"{way:44}{sum(a == b for a, b in pairs):4} of {len(pairs)} identical {seconds:7.0f} s", flush=True)
        for number, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                print(f"    prompt {number + 1}: {self._parting(number, ours, theirs)}", flush=True)

    def _parting(self, number: int, ours: list[int], theirs: list[int]) -> str:
        place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        if place < 0:
            return f"{len(ours)} tokens against {len(theirs)}"
        logits = logits_of(self._model, self._asked.prompts[number], ours[:place])[-1]
        one, other = float(logits[ours[place]]), float(logits[theirs[place]])
        return f"token {place + 1}: {ours[place]} against {theirs[place]}, logits {one:.6f} and {other:.6f}"


@torch.inference_mode()
def compare_run(run: str, asked: Asked, generated: int) -> None:
    """All ways of asking a run."""
    ready = open_answerer({NAME: run}, slots=1, tokens=POSITIONS, dtype="float32")
    wanted = tokens_of(answers(ready.answerer, asked))
    model, tokenizer = qdist.load(run, dtype="float32", device="cpu")
    report, few = Report(model, asked), asked.first(generated)
    report.compare(
        "alone, against generate", wanted, lambda: [by_generate(model, p, asked.tokens) for p in few.prompts]
    )
    passes = zip(asked.prompts, wanted, strict=True)
    report.compare(
        "alone, against passes over whole answers", wanted,
        lambda: [logits_of(model, prompt, own[:-1]).argmax(-1).tolist() for prompt, own in passes],
    )  # fmt: skip
    few = asked.first(max(1, generated // 4))
    report.compare("one by one", wanted, lambda: tokens_of(one_by_one(model, tokenizer, few)))
    del ready
    gc.collect()
    ready = open_answerer({NAME: run}, slots=SLOTS, tokens=POSITIONS, dtype="float32")
    report.compare("16 at a time", wanted, lambda: tokens_of(answers(ready.answerer, asked)))
    report.compare(
        "joining 16 rows at random times", wanted, lambda: tokens_of(answers(ready.answerer, asked, joining=True))
    )
    texts = [text_of(own, script_of(model, run)) for own in wanted]
    begin = time.perf_counter()
    with serving(run) as address:
        found = asyncio.run(served(address, asked))
    same = sum(a == b for a, b in zip(texts, found, strict=True))
    print(f"{'the server, 8 clients':44}{same:4} of {len(found)} identical {time.perf_counter() - begin:7.0f} s")
    for number, (ours, theirs) in enumerate(zip(texts, found, strict=True), 1):
        if ours != theirs:
            print(f"    prompt {number}: {ours!r}\n    against {theirs!r}")


@torch.inference_mode()
def compare_merged(run: str, merged: str, asked: Asked) -> None:
    """A QA-LoRA run against its merge."""
    ready = open_answerer({NAME: run}, slots=SLOTS, tokens=POSITIONS, dtype="float32")
    wanted = tokens_of(answers(ready.answerer, asked))
    del ready
    gc.collect()
    other = open_answerer({"": merged}, slots=SLOTS, tokens=POSITIONS, dtype="float32")
    report = Report(qdist.load(run, dtype="float32", device="cpu")[0], asked)
    report.compare(
        "QA-LoRA, merged against adapter", wanted, lambda: tokens_of(answers(other.answerer, asked, adapter=""))
    )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--generated", type=int, default=80)
    parser.add_argument("--exact", nargs=2, metavar=("QA_RUN", "MERGED"))
    given = parser.parse_args()
    compare_run(given.run, read(given.run, given.data, given.prompts, given.tokens), given.generated)
    if given.exact:
        run, merged = given.exact
        compare_merged(run, merged, read(run, given.data, min(given.prompts, 20), given.tokens))


if __name__ == "__main__":
    main()
