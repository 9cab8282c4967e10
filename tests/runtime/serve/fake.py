"""An answerer that says the words of its prompt again, one a step, when a test lets it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, NamedTuple

from starlette.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qdist.core.data.conversation import Wording
from qdist.core.errors import JobError, QdistError
from qdist.runtime.infer.answerer import Answerer, Ended, Likely, Listener, Piece, Question
from qdist.runtime.infer.prompts import Speech
from qdist.runtime.infer.runner import Runner
from qdist.runtime.serve.app import Service, application
from qdist.runtime.serve.asking import Served
from qdist.runtime.serve.desk import Desk

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.x }}]{% endfor %}{% endfor %}"
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('it does not like that') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A tokenizer of bytes: `a` is one token, `é` two."""
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate([*ALPHABET, "<end>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    found.chat_template = template
    return found


TOKENIZER = byte_tokenizer()
SPEECH = Speech(TOKENIZER, Wording(style="chat"), 256)


class _Work(NamedTuple):
    question: Question
    listener: Listener
    said: list[int]


class Echo:
    """Answers with the tokens of its prompt. hold: answers wait at each token until `let` is called."""

    adapters = ("sql",)
    positions = 256

    def __init__(self, *, slots: int = 4, hold: bool = False, fail_at: int | None = None) -> None:
        self.slots, self._fail_at, self._hold = slots, fail_at, hold
        self._go = threading.Semaphore(0)
        self._tickets = count(1)
        self._line: dict[int, _Work] = {}
        self._steps = 0
        self.errors: dict[str, QdistError] = {}
        """What ends an answer that would say a letter."""
        self.seen: list[Question] = []
        self.closed = False

    def let(self, steps: int) -> None:
        """Let so many steps be made."""
        for _ in range(steps):
            self._go.release()

    def submit(self, question: Question, listener: Listener) -> int:
        ticket = next(self._tickets)
        self._line[ticket] = _Work(question, listener, [])
        self.seen.append(question)
        return ticket

    def cancel(self, ticket: int) -> None:
        work = self._line.pop(ticket, None)
        if work:
            work.listener(Ended("cancelled", "", len(work.question.prompt), len(work.said)))

    def step(self) -> bool:
        if self._hold and not self._go.acquire(timeout=0.01):
            return bool(self._line)
        self._steps += 1
        if self._steps == self._fail_at:
            raise JobError("logits are NaN at token 3", try_="less")
        for ticket in list(self._line)[: self.slots]:
            self._speak(ticket)
        return bool(self._line)

    def _speak(self, ticket: int) -> None:
        question, listener, said = self._line[ticket]
        place, most = len(said), question.sampling.max_new_tokens
        if place == len(question.prompt):
            return self._end(ticket, "stop")
        token = question.prompt[place]
        if (error := self.errors.get(TOKENIZER.decode([token]))) is not None:
            return self._end(ticket, "error", error)
        said.append(token)
        text = TOKENIZER.decode([token])
        if text in question.sampling.stop:
            return self._end(ticket, "stop")
        wanted = question.sampling.logprobs
        likely = (Likely(token, text, -0.5), Likely(5, "%", float("-inf")))[: max(wanted, 0)]
        listener(Piece(token, text, None if wanted < 0 else -0.5, likely))
        if place + 1 == most:
            self._end(ticket, "length")
        return None

    def _end(self, ticket: int, reason: Any, error: QdistError | None = None) -> None:
        question, listener, said = self._line.pop(ticket)
        listener(Ended(reason, "", len(question.prompt), len(said), error))

    @property
    def working(self) -> int:
        return min(self.slots, len(self._line))

    @property
    def waiting(self) -> int:
        return max(0, len(self._line) - self.slots)


class Started(NamedTuple):
    """A service over a fake answerer."""

    app: ASGIApp
    service: Service
    echo: Echo
    runner: Runner
    desk: Desk


def models_served(speech: Speech = SPEECH) -> Mapping[str, Served]:
    return {"sql": Served("sql", "sql", speech), "base": Served("base", "", speech)}


class Desks(NamedTuple):
    """A service over an answerer."""

    app: ASGIApp
    service: Service
    runner: Runner
    desk: Desk


@asynccontextmanager
async def answering(
    answerer: Answerer, models: Mapping[str, Served], *, most: int = 64, key: str = "", hosts: Sequence[str] = ()
) -> AsyncIterator[Desks]:
    """An application that is ready, over any answerer."""
    loop, desks = asyncio.get_running_loop(), list[Desk]()
    service = Service(key=key, hosts=hosts, started=7)

    def failed(error: Any) -> None:
        loop.call_soon_threadsafe(desks[0].fail, error)

    with Runner(answerer, when_failed=failed) as runner:
        desk = Desk(runner, models, service.meters, most=most)
        desks.append(desk)
        service.open(desk)
        try:
            yield Desks(application(service), service, runner, desk)
        finally:
            desk.close()


@asynccontextmanager
async def started(echo: Echo | None = None, *, speech: Speech = SPEECH, **given: Any) -> AsyncIterator[Started]:
    """An application that is ready, over the fake."""
    echo = echo or Echo()
    async with answering(echo, models_served(speech), **given) as (app, service, runner, desk):
        yield Started(app, service, echo, runner, desk)


async def until(met: Callable[[], bool]) -> None:
    """Let others run until something is so."""
    async with asyncio.timeout(20):
        while not met():
            await asyncio.sleep(0)
