"""What a limit on chat templates costs, and which templates it stops.

    python -m bench.chaos.templates --count 10000

Renders a conversation of six turns by a ChatML template with and without the limit, in turns, and then templates that
would take all time or memory, each in a process of its own. Exit code 1 where one of them gets what it wants, or the
limit costs more than 10 us a rendering. About two minutes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.chaos.ground import table
from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import QdistError
from qdist.runtime.data import chat_template
from qdist.runtime.data import chat_template as limited
from qdist.runtime.data.tokenizer import open_tokenizer
from tests.runtime.data.test_tokenized import tiny_tokenizer

_MOST_COSTS_US = 10.0
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DOUBLED = "{% set space = namespace(x='a') %}{% for i in range(60) %}{% set space.x = space.x ~ space.x %}{% endfor %}"
_HOSTILE = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a doubled text": _DOUBLED + "{{ space.x }}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a wide format": "{{ '{:>9999999999}'.format(1) }}",
    "a filled text": "{{ 'a'.ljust(10**11) }}",
    "a centred text": "{{ 'a'|center(10**11) }}",
    "a replaced text": "{{ ('a' * 10**6)|replace('a', 'a' * 10**6) }}",
    "a macro of itself": "{% macro m(x) %}{{ m(x + 1) }}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "a comparison": "{% set s = namespace(a=[1], b=[1]) %}{% for i in range(70) %}{% set s.a = [s.a, s.a] %}"
    "{% set s.b = [s.b, s.b] %}{% endfor %}{{ s.a == s.b }}",
    "a power": "{% set n = 10 %}{{ (n ** (n ** 9)) > 1 }}",
}


def conversation(turns: int) -> Conversation:
    """Questions and answers in turn."""
    words = "some words of a usual length, as they come in records " * 4
    made = [Turn("assistant" if index % 2 else "user", f"{index} {words}", bool(index % 2)) for index in range(turns)]
    return Conversation(turns=tuple(made), where="here")


def tokenizer_with(template: str, folder: Path) -> Any:
    """A small tokenizer with a chat template."""
    if not folder.exists():
        tiny_tokenizer(bos=False).save_pretrained(folder)
    tokenizer = open_tokenizer(folder, "none")
    tokenizer.chat_template = template
    return tokenizer


def _seconds(count: int, tokenizer: Any, limit: Callable[..., Any]) -> float:
    chat_template.limited, before = limit, chat_template.limited
    asked, began = conversation(5), time.process_time()
    for _ in range(count):
        chat_template.prompt_text(asked, tokenizer)
    chat_template.limited = before
    return (time.process_time() - began) / count


def _render(template: str, folder: Path, to: Any) -> None:
    try:
        chat_template.prompt_text(conversation(1), tokenizer_with(template, folder))
        to.send("rendered")
    except QdistError as error:
        to.send(error.message[:90])


def outcome(template: str, folder: Path) -> tuple[str, float]:
    """What rendering ends with, in a process of its own, and its seconds."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process, began = context.Process(target=_render, args=(template, folder, theirs)), time.monotonic()
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(90) else "hung"
    except EOFError:
        process.join()
        said = f"killed by signal {-(process.exitcode or 0)}"
    process.kill()
    process.join()
    return said, time.monotonic() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    given = parser.parse_args()
    with TemporaryDirectory() as place:
        folder = Path(place, "tokenizer")
        tokenizer = tokenizer_with(_CHATML, folder)
        parts, free, held = 20, list[float](), list[float]()
        for _ in range(parts):
            free.append(_seconds(given.count // parts, tokenizer, lambda call: call()))
            held.append(_seconds(given.count // parts, tokenizer, limited.limited))
        without, with_ = min(free), min(held)
        rows = [(name, *outcome(template, folder)) for name, template in _HOSTILE.items()]
    print(table(("template", "ended", "s"), [(name, said, f"{took:.1f}") for name, said, took in rows]))
    costs_us = 1e6 * (with_ - without)
    print(f"a rendering: {1e6 * without:.1f} us without the limit, {costs_us:.1f} more with it")
    sys.exit(costs_us > _MOST_COSTS_US or any(said in ("rendered", "hung") for _, said, _ in rows))


if __name__ == "__main__":
    main()
