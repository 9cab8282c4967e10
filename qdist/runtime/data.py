"""How a data source becomes a tokenized set, once: later runs with the same contents map the file written first."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdist.core import demo
from qdist.core.errors import DataError
from qdist.core.records import Conversation, check_format, conversations
from qdist.host.record_types import Located
from qdist.host.records import read_records, source_digest
from qdist.runtime.encode import tokenize
from qdist.runtime.tokenized import TokenizedSet, load, save

DEMO = demo.NAME
"""The source that names the generated data set of `qdist.core.demo`."""

_VERSION = 1
"""Raise it whenever the same records would become other tokens or labels."""


def cached_tokenize(
    source: str, tokenizer: Any, *, seq_len: int, train_on_source: bool, folder: Path, data_format: str | None = None
) -> tuple[TokenizedSet, Path]:
    """The tokenized set of `source` and its file in `folder`, written unless it is there.

    source: 'demo', a file, a folder or a hub data set, as `read_records` takes them.
    folder: where sets are kept, each under its key; ranks may race for it, the files are equal.
    """
    if data_format is not None:
        check_format(data_format)
    key = cache_key(source, tokenizer, seq_len=seq_len, train_on_source=train_on_source, data_format=data_format)
    path = folder / f"{key}.safetensors"
    if path.is_file():
        return load(path, key=key), path
    found = read_conversations(source, data_format=data_format)
    tokenized = tokenize(found, tokenizer, seq_len=seq_len, train_on_source=train_on_source)
    save(tokenized, path, key=key)
    return tokenized, path


def cache_key(
    source: str, tokenizer: Any, *, seq_len: int, train_on_source: bool, data_format: str | None = None
) -> str:
    """The sha256 of all that decides what a tokenized set holds."""
    records = _digest(demo.records()) if source == DEMO else source_digest(source)
    parts = [_VERSION, records, tokenizer_digest(tokenizer), data_format, seq_len, train_on_source]
    return _digest(parts)


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 of a tokenizer's vocabulary, rules, special tokens and chat template.

    The padding and truncation that a fast tokenizer keeps from its last call are left out.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(padding=None, truncation=None)
    else:
        rules = tokenizer.get_vocab()
    return _digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template])


def read_conversations(source: str, *, data_format: str | None = None) -> Iterator[Conversation]:
    """The conversations of a source, in order. Raises DataError at the first record that cannot be used."""
    if source == DEMO:
        located: Iterator[Located] = (
            (f"demo, record {number}", dict(record)) for number, record in enumerate(demo.records(), 1)
        )
    else:
        located = read_records(source)
    for where, record in located:
        if isinstance(record, DataError):
            raise record
        yield from conversations(record, where=where, data_format=data_format)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
