"""Files of published records become tokens of which exactly the answers meant are learned, with their ends."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.conversation import Conversation
from qdist.core.data.preferences import CHOSEN
from qdist.core.data.records import UNASKED, conversations
from qdist.host.data.records import read_records
from qdist.runtime.data.encode import Encoder
from qdist.runtime.data.wording import Told
from tests.core.data.published import PUBLISHED, Published
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.family_templates import family_tokenizer


@pytest.fixture(scope="module")
def chatml() -> Any:
    """A tokenizer with a chat template."""
    return family_tokenizer("chatml")


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tokenizer without."""
    return tiny_tokenizer(None)


def from_file(own: Published, folder: Path) -> Conversation:
    """The conversation of a file that holds the record; twice where its columns alone do not say that it is one."""
    path = folder / "data.jsonl"
    path.write_text(f"{json.dumps(own.record)}\n" * (2 if own.reading.columns else 1))
    where, record = next(read_records(str(path)))
    assert isinstance(record, dict)
    (found,) = conversations(record, where=where, reading=own.reading)
    return found


def learned(conversation: Conversation, tokenizer: Any) -> list[str]:
    """The stretches of a sample that are learned."""
    (sample,) = Encoder(tokenizer).encode(conversation).samples
    stretches = groupby(zip(sample.tokens, sample.learn, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in stretch]) for learn, stretch in stretches if learn]


@pytest.mark.parametrize("own", PUBLISHED, ids=lambda own: own.name)
def test_answers_and_the_ends_of_their_turns_are_learned(own: Published, tmp_path: Path, chatml: Any) -> None:
    end = "<|endoftext|>" if own.format == "text" else "<|im_end|>"
    assert learned(from_file(own, tmp_path), chatml) == [f"{text}{end}" for text in own.learned]


@pytest.mark.parametrize("own", PUBLISHED, ids=lambda own: own.name)
def test_without_a_chat_template_answers_end_with_the_text(own: Published, tmp_path: Path, plain: Any) -> None:
    found = from_file(own, tmp_path)
    before = " " if found.style == "headings" and not found.verbatim else ""
    assert learned(found, plain) == [f"{before}{text}</s>" for text in own.learned]


def test_what_was_left_out_of_records_is_told_once_with_their_number(plain: Any) -> None:
    chosen = {"prompt": "q", "chosen": "a", "rejected": "b"}
    said = (("gpt", "a"), ("human", "q"), ("gpt", "b"))
    cut = {"conversations": [{"from": name, "value": text} for name, text in said]}
    told = Told(plain)
    for record in (chosen, chosen, cut):
        (found,) = conversations(record, where="f.jsonl:1")
        told.add(found, Encoder(plain).encode(found))
    wording, notes = told.summed_up(3)
    assert wording.format == "preference, sharegpt"
    assert f"{CHOSEN}: in 2 of 3 records" in notes
    assert f"{UNASKED}: in 1 of 3 records" in notes
