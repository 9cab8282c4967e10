"""A tokenized data set, in memory and as a file that later runs with the same contents memory-map."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import safe_open

from qdist.core.data import demo
from qdist.core.data.conversation import Conversation, Wording
from qdist.core.data.records import BadRecords, check_format
from qdist.core.errors import DataError
from qdist.core.text import quoted
from qdist.host.data.records import read_conversations, source_digest
from qdist.host.files import replacing, sync
from qdist.host.opening import require_file, told
from qdist.runtime.data.encode import Encoder, Sample
from qdist.runtime.data.wording import Told
from qdist.runtime.formats.packed_folder import entries_of, write_safetensors
from qdist.runtime.formats.recorded_sums import is_intact, sealed

IGNORED = -100
"""Label of tokens without a loss, as in transformers and torch."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of tokenizing the records."""

    records: int
    dropped: int
    """Records left out because they have nothing to learn, before or after truncation."""
    truncated: int
    """Records cut at seq_len, including dropped ones."""
    tokens: int
    learned_tokens: int
    whole: int | None = None
    """Records of which every token is learned; None in sets of an older qdist, which did not count them."""
    wording: Wording | None = None
    """None for random tokens."""
    notes: tuple[str, ...] = ()
    """What was dropped, cut or written differently, for the user."""


class TokenizedSet(NamedTuple):
    """Concatenated samples; sample i is `offsets[i]:offsets[i + 1]`.

    tokens, labels: int32 [tokens]. A label is aligned with its token, as transformers has it: the loss of position
    p - 1 is taken against label p, so the first label of a sample never counts.
    offsets: int64 [samples + 1].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    summary: Summary

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def span(self, index: int) -> slice:
        """Range of sample `index` in `tokens` and `labels`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def learned_tokens(tokenized: TokenizedSet, indices: Iterable[int]) -> int:
    """Number of tokens of these samples that have a loss: a sample's first token has nothing to predict it."""
    spans = (tokenized.span(index) for index in indices)
    return sum(int((tokenized.labels[span.start + 1 : span.stop] != IGNORED).sum()) for span in spans)


def save(tokenized: TokenizedSet, path: Path, *, key: str) -> None:
    """Write the set to a temporary file and rename it to `path`, so that no reader sees a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": tokenized.tokens, "labels": tokenized.labels, "offsets": tokenized.offsets}
    summary = msgspec.json.encode(tokenized.summary).decode()
    metadata = sealed(arrays, {"key": key, "summary": summary})
    with replacing(path) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
        write_safetensors(file, entries_of(arrays), metadata=metadata)
    sync(path.parent)


def load(path: Path, *, key: str) -> TokenizedSet:
    """Memory-map the set at `path`; it is read once for its checksum, and again as it is used.

    Raises DataError when the file is damaged or was written for another key.
    """
    gone = quoted("rm", path)
    require_file(path, DataError, try_=gone)
    with told(f"{path} is damaged", DataError, try_=gone), safe_open(path, framework="pt", device="cpu") as stored:
        found = stored.metadata() or {}
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (a handle is not a dict)
        if not is_intact(arrays, found):
            raise DataError(f"{path} is damaged: it does not hold the tokens that were written", try_=gone)
        if found.get("key") != key:
            raise DataError(f"{path} holds key {found.get('key')}, not {key}", try_=gone)
        summary = msgspec.json.decode(found["summary"], type=Summary)
    return TokenizedSet(arrays["tokens"], arrays["labels"], arrays["offsets"], summary)


DEMO = demo.NAME
"""Source name of the generated data set of `qdist.core.data.demo`."""

_VERSION = 4
"""Increment whenever the same records would give other tokens or labels."""


def cached_tokenize(
    source: str,
    tokenizer: Any,
    *,
    seq_len: int,
    train_on_source: bool,
    folder: Path,
    data_format: str | None = None,
    rows: int | None = None,
) -> tuple[TokenizedSet, Path]:
    """The tokenized set of `source` and its file in `folder`, written if missing.

    source: 'demo', a file, a folder or a hub data set, as `read_records` takes them.
    folder: where sets are kept, each under its key; ranks may race for it, the files are equal.
    rows: see `tokenize`.
    """
    if data_format is not None:
        check_format(data_format)
    key = cache_key(source, tokenizer, seq_len=seq_len, train_on_source=train_on_source, data_format=data_format)
    path = folder / f"{key}.safetensors"
    if path.is_file():
        return load(path, key=key), path
    found = read_conversations(source, data_format=data_format)
    tokenized = tokenize(found, tokenizer, seq_len=seq_len, train_on_source=train_on_source, rows=rows)
    save(tokenized, path, key=key)
    return tokenized, path


def cache_key(
    source: str, tokenizer: Any, *, seq_len: int, train_on_source: bool, data_format: str | None = None
) -> str:
    """SHA-256 of everything that determines a tokenized set."""
    records = _digest(demo.records()) if source == DEMO else source_digest(source)
    parts = [_VERSION, records, tokenizer_digest(tokenizer), data_format, seq_len, train_on_source]
    return _digest(parts)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules, special tokens and chat template.

    The padding and truncation that a fast tokenizer keeps from its last call are left out.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.update(padding=None, truncation=None)
    else:
        rules = tokenizer.get_vocab()
    return _digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template])


def tokenize(
    found: Iterable[Conversation | DataError],
    tokenizer: Any,
    *,
    seq_len: int,
    train_on_source: bool,
    rows: int | None = None,
) -> TokenizedSet:
    """Tokenize for causal training, with the loss on the assistant's turns, or on all with `train_on_source`.

    found: conversations, and errors in place of those that could not be read.
    tokenizer: a transformers tokenizer; the chat template, where it has one, needs a fast one.
    seq_len: samples are cut there, on the right. One that has nothing left to learn is dropped and counted.
    rows: of the embedding; a token behind them has no place in the model.

    Raises DataError when nothing is left at all, and once for all records that cannot be used.
    """
    reader = _Pass(tokenizer, seq_len=seq_len, train_on_source=train_on_source, rows=rows)
    for conversation in found:
        reader.add(conversation)
    return reader.tokenized()


class _Pass:
    """One pass over all records."""

    def __init__(self, tokenizer: Any, *, seq_len: int, train_on_source: bool, rows: int | None) -> None:
        self._tokenizer, self._seq_len, self._all, self._rows = tokenizer, seq_len, train_on_source, rows
        self._tokens, self._labels, self._offsets = array("i"), array("i"), array("q", [0])
        self._records = self._truncated = self._learned = self._longest_prompt = self._whole = 0
        self._dropped: dict[str, int] = {}
        self._bad, self._told, self._encoder = BadRecords(), Told(tokenizer), Encoder(tokenizer)

    def add(self, conversation: Conversation | DataError) -> None:
        """Process the next record."""
        self._records += 1
        if isinstance(conversation, DataError):
            self._bad.add(conversation)
            return
        self._told.unused |= dict.fromkeys(conversation.unused)
        if not conversation.learns and not self._all:
            self._drop(conversation.why_nothing)
            return
        try:
            self._require_no_marks(conversation)
            encoded = self._encoder.encode(conversation)
            self._require_rows(conversation, encoded.samples)
            self._require_one_sample(conversation, encoded.samples)
        except DataError as error:
            self._bad.add(error)
            return
        if not self._all and not any(True in sample.learn for sample in encoded.samples):
            self._drop("the answer is empty")  # but for the end of the turn
            return
        self._told.add(conversation, encoded)
        self._truncated += any(len(sample.tokens) > self._seq_len for sample in encoded.samples)
        learned, tokens = self._learned, len(self._tokens)
        kept = sum(map(self._keep, encoded.samples))
        if not kept:
            self._drop(f"nothing to learn within seq_len={self._seq_len}")
        # A sample's first token never has a loss.
        self._whole += bool(kept) and self._learned - learned == len(self._tokens) - tokens - kept

    def tokenized(self) -> TokenizedSet:
        """The set of all kept samples. Raises DataError as `tokenize` does."""
        self._bad.raise_any(self._records)
        if len(self._offsets) == 1:
            raise self._nothing_left()
        wording, notes = self._told.summed_up(self._records)
        summary = Summary(
            records=self._records,
            dropped=sum(self._dropped.values()),
            truncated=self._truncated,
            tokens=len(self._tokens),
            learned_tokens=self._learned,
            whole=self._whole,
            wording=wording,
            notes=(*self._counts(), *notes),
        )
        return TokenizedSet(
            torch.frombuffer(self._tokens, dtype=torch.int32),
            torch.frombuffer(self._labels, dtype=torch.int32),
            torch.frombuffer(self._offsets, dtype=torch.int64),
            summary,
        )

    def _keep(self, sample: Sample) -> bool:
        """Truncate and add a sample; whether anything was left to learn."""
        prompt = sample.learn.index(True) if True in sample.learn else len(sample.tokens)
        self._longest_prompt = max(self._longest_prompt, prompt)
        tokens = sample.tokens[: self._seq_len]
        labels = [token if learn or self._all else IGNORED for token, learn in zip(tokens, sample.learn, strict=False)]
        count = len(labels[1:]) - labels[1:].count(IGNORED)
        if count:
            self._tokens.extend(tokens)
            self._labels.extend(labels)
            self._offsets.append(len(self._tokens))
            self._learned += count
        return bool(count)

    def _drop(self, reason: str) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + 1

    def _require_no_marks(self, conversation: Conversation) -> None:
        """Refuse turns that are marked as not learned, because with `train_on_source` everything is."""
        marked = any(turn.role == "assistant" and not turn.learn and turn.text.strip() for turn in conversation.turns)
        if self._all and marked:
            raise DataError(
                f"{conversation.where}: an answer is marked as not to be learned, and train.train_on_source=true "
                "learns every token",
                try_="--set train.train_on_source=false",
            )

    def _require_one_sample(self, conversation: Conversation, samples: tuple[Sample, ...]) -> None:
        if self._all and len(samples) > 1:
            raise DataError(
                f"{conversation.where}: earlier answers become other text or tokens once later ones follow, so each is "
                "a sample of its own, and train.train_on_source=true would learn questions twice",
                try_="--set train.train_on_source=false",
            )

    def _require_rows(self, conversation: Conversation, samples: tuple[Sample, ...]) -> None:
        for sample in samples:
            largest = max(sample.tokens, default=0)
            if self._rows is not None and largest >= self._rows:
                token = self._tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"{conversation.where}: {token!r} is token {largest:,}, and the model has {self._rows:,} rows",
                    try_=f"records without {token!r}, or the tokenizer that belongs to these weights",
                )

    def _counts(self) -> Iterator[str]:
        if self._truncated:
            yield f"{self._truncated:,} of {self._records:,} records were cut at seq_len={self._seq_len}"
        for reason, count in self._dropped.items():
            yield f"{count:,} of {self._records:,} records were dropped: {reason}"
        if self._whole and not self._all:
            yield f"every token of {self._whole:,} of {self._records:,} records has a loss: nothing in them is given"

    def _nothing_left(self) -> DataError:
        if not self._records:
            return DataError("the data holds no conversation")
        cut = f"nothing to learn within seq_len={self._seq_len}"
        if self._dropped.get(cut) == self._records:
            return DataError(
                f"all {self._records} records were dropped: none has a token to learn within seq_len={self._seq_len}; "
                f"the longest prompt has {self._longest_prompt} tokens",
                try_=f"seq_len above {self._longest_prompt}",
            )
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in self._dropped.items())
        alone = next(iter(self._dropped)) if len(self._dropped) == 1 else reasons
        return DataError(
            f"all {self._records} records were dropped: {alone}", try_="records with an answer that is to be learned"
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
