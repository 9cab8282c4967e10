"""A chat template that would take all time or memory is stopped, and what it is of is told."""

import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError, ModelError
from qdist.runtime.data import limits
from qdist.runtime.data.chat_template import prompt_text
from qdist.runtime.data.tokenizer import open_tokenizer
from tests.runtime.data.test_tokenized import tiny_tokenizer

ASKED = Conversation(turns=(Turn("user", "hello", False),), where="data.jsonl:3")
DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return open_tokenizer(folder, "none")


def rendered(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    return prompt_text(ASKED, tokenizer)


def test_a_template_without_end_is_stopped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_S", 0.05)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match=r"the tokenizer's chat template took longer than 0.05 s on data.jsonl:3"):
        rendered(tokenizer, loops)
    assert rendered(tokenizer, "{{ messages[0].content }}") == "hello"


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 10**11 }}", DOUBLED, "{{ '%99999999999d' % 1 }}", "{{ 'a'.ljust(10**11) }}", "{{ 'a'|center(10**11) }}"],
)
def test_a_template_that_asks_for_all_memory_gets_none(template: str, tokenizer: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ModelError, match=r"chat template took more than 1.0 GiB of memory on data.jsonl:3"):
        rendered(tokenizer, template)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_template_that_writes_without_end_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"chat template wrote 70,000,000 characters on data.jsonl:3"):
        rendered(tokenizer, "{{ 'a' * 70000000 }}")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}", "nested too deeply"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ messages[0].__class__.__base__.__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)
def test_a_template_that_fails_is_told_with_the_record(template: str, why: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"data.jsonl:3: the tokenizer's chat template refuses it: .*{why}"):
        rendered(tokenizer, template)


def test_nothing_of_a_limit_is_left() -> None:
    assert limits.limited(lambda: 3) == 3
    with pytest.raises(KeyError):
        limits.limited(lambda: {}["x"])
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_time_is_that_of_the_processor_and_so_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a crowded machine a harmless template takes long by the clock."""
    monkeypatch.setattr(limits, "MOST_S", 0.02)

    def busy() -> float:
        end = time.process_time() + 10
        while time.process_time() < end:
            pass
        return end

    with pytest.raises(limits.TooLong):
        limits.limited(busy)
