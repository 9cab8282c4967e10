"""Conversations become samples: which tokens, cut where, with a loss on which of them, and what is told of it?"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from qdist.core.data.conversation import Conversation
from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import counted
from qdist.runtime.data.encode import Encoder, Sample, opening
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet
from qdist.runtime.data.wording import Told, WordingCounts, count_up


class SampleRules(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the samples of a conversation, beside the tokenizer."""

    seq_len: int
    """Tokens of a sample at most. A longer one is cut there, on the right; a document is cut into pieces."""
    train_on_source: bool = False
    """Whether every token has a loss, instead of those of answers."""
    rows: int | None = None
    """Rows of the embedding; a token behind them has no place in the model."""
    source_max_len: int | None = None
    """Tokens of a prompt at most; see `data.source_max_len`."""
    target_max_len: int | None = None

    @property
    def bounds_parts(self) -> bool:
        """Whether prompts and answers have lengths of their own."""
        return self.source_max_len is not None or self.target_max_len is not None


def sample_rules(spec: RunSpec, *, rows: int) -> SampleRules:
    """Those of a run. rows: of the embedding."""
    return SampleRules(
        seq_len=spec.seq_len,
        train_on_source=spec.train.train_on_source,
        rows=rows,
        source_max_len=spec.data.source_max_len,
        target_max_len=spec.data.target_max_len,
    )


class Tally(msgspec.Struct):
    """What a pass counts; that of parts is the sum of theirs, in their order."""

    records: int = 0
    truncated: int = 0
    learned: int = 0
    whole: int = 0
    longest_prompt: int = 0
    dropped: dict[str, int] = {}
    """Records by why they were dropped."""
    documents: int = 0
    pieces: int = 0
    """Documents that became several pieces, and how many."""
    cut_prompts: int = 0
    cut_answers: int = 0
    bad: int = 0
    first_bad: list[tuple[str, str]] = []
    """Message and advice of the first errors."""
    wording: WordingCounts = msgspec.field(default_factory=WordingCounts)

    def extend(self, other: "Tally") -> None:
        """Count what follows too."""
        longest = max(self.longest_prompt, other.longest_prompt)
        _add_counts(self, other)
        self.longest_prompt = longest

    def bad_records(self) -> BadRecords:
        """The records that cannot be used."""
        found = BadRecords()
        found.extend(self.bad, (DataError(message, try_=try_) for message, try_ in self.first_bad))
        return found


def _add_counts(into: msgspec.Struct, more: msgspec.Struct) -> None:
    """Add numbers to numbers, those of keys to those of the same keys, and lists to lists."""
    for name in (field.name for field in msgspec.structs.fields(into)):
        own, other = getattr(into, name), getattr(more, name)
        if isinstance(own, dict):
            own.update({key: own.get(key, 0) + count for key, count in other.items()})
        elif isinstance(own, msgspec.Struct):
            _add_counts(own, other)
        else:
            setattr(into, name, own + other)


def tokenize(found: Iterable[Conversation | DataError], tokenizer: Any, rules: SampleRules) -> TokenizedSet:
    """Tokenize for causal training, with the loss on the assistant's turns, or on all with `train_on_source`.

    found: conversations, and errors in place of those that could not be read.
    tokenizer: a transformers tokenizer; the chat template, where it has one, needs a fast one.

    A sample that has nothing left to learn is dropped and counted. Raises DataError when nothing is left at all, and
    once for all records that cannot be used.
    """
    return tokenize_sources((found,), tokenizer, rules)


def tokenize_sources(
    sources: Iterable[Iterable[Conversation | DataError]], tokenizer: Any, rules: SampleRules, *, skip_bad: int = 0
) -> TokenizedSet:
    """Tokenize several sources as `tokenize` does one; their samples lie one behind another.

    skip_bad: records that cannot be used and may be left out.
    """
    reader, firsts = RecordPass(tokenizer, rules), list[int]()
    for found in sources:
        firsts.append(len(reader.samples.lengths))
        for conversation in found:
            reader.add(conversation)
    samples = reader.samples
    told = summary(reader.tally, tokenizer, rules, firsts=firsts, sizes=samples.sizes, skip_bad=skip_bad)
    return samples.tokenized(told)


def read_part(
    found: Iterable[Conversation | DataError], tokenizer: Any, rules: SampleRules
) -> tuple["SampleArrays", Tally]:
    """The samples of some records, and what is counted of them."""
    reader = RecordPass(tokenizer, rules)
    for conversation in found:
        reader.add(conversation)
    return reader.samples, reader.tally


class Sizes(NamedTuple):
    """How much there is of something tokenized."""

    samples: int
    tokens: int


def summary(
    tally: Tally, tokenizer: Any, rules: SampleRules, *, firsts: Sequence[int], sizes: Sizes, skip_bad: int
) -> Summary:
    """The statistics of a whole set. Raises DataError as `tokenize` does.

    firsts: index of the first sample of each source. skip_bad: as for `tokenize_sources`.
    """
    bad = tally.bad_records()
    bad.raise_any(tally.records, allowed=skip_bad)
    if not sizes.samples:
        raise _nothing_left(tally, rules)
    wording, notes = Told(tokenizer, tally.wording).summed_up(tally.records)
    return Summary(
        records=tally.records,
        dropped=sum(tally.dropped.values()),
        truncated=tally.truncated,
        tokens=sizes.tokens,
        learned_tokens=tally.learned,
        whole=tally.whole,
        wording=wording,
        notes=(*bad.notes(tally.records), *notes_of(tally, rules), *notes),
        firsts=tuple(firsts),
        bad=tally.bad,
    )


class SampleArrays:
    """Samples one after another, in memory."""

    def __init__(self) -> None:
        self.tokens, self.labels = array("i"), array("i")
        self.lengths, self.learned = array("q"), array("i")

    def add(self, tokens: Sequence[int], labels: Sequence[int], learned: int) -> None:
        """Append a sample. learned: how many of its tokens have a loss."""
        self.tokens.extend(tokens)
        self.labels.extend(labels)
        self.lengths.append(len(tokens))
        self.learned.append(learned)

    @property
    def sizes(self) -> Sizes:
        """How many there are."""
        return Sizes(len(self.lengths), len(self.tokens))

    def arrays(self) -> dict[str, torch.Tensor]:
        """All of them by name: tokens, labels and learned int32, lengths int64."""
        named = {"tokens": self.tokens, "labels": self.labels, "lengths": self.lengths, "learned": self.learned}
        return {name: torch.from_numpy(np.asarray(own)) for name, own in named.items()}

    def tokenized(self, summary: Summary) -> TokenizedSet:
        """The samples as a set."""
        arrays = self.arrays()
        lengths = arrays["lengths"]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return TokenizedSet(arrays["tokens"], arrays["labels"], offsets, summary, arrays["learned"])


class RecordPass:
    """One pass over records."""

    def __init__(self, tokenizer: Any, rules: SampleRules) -> None:
        self.samples, self.tally = SampleArrays(), Tally()
        self.lost = array("q")
        """Tokens that each cut record loses."""
        self._tokenizer, self._rules, self._all = tokenizer, rules, rules.train_on_source
        self._bad, self._told, self._encoder = BadRecords(), Told(tokenizer, self.tally.wording), Encoder(tokenizer)
        self._opening = opening(tokenizer)

    def add(self, conversation: Conversation | DataError) -> None:
        """Process the next record."""
        self.tally.records += 1
        if isinstance(conversation, DataError):
            self._add_bad(conversation)
            return
        self._told.add_unused(conversation)
        if not conversation.learns and not self._all:
            self._drop(conversation.why_nothing)
            return
        try:
            self._require_no_marks(conversation)
            encoded = self._encoder.encode(conversation)
            self._require_rows(conversation, encoded.samples)
            self._require_one_sample(conversation, encoded.samples)
            self._require_one_answer(conversation, encoded.samples)
        except DataError as error:
            self._add_bad(error)
            return
        if not self._all and not any(True in sample.learn for sample in encoded.samples):
            self._drop("the answer is empty")  # but for the end of the turn
            return
        self._told.add(conversation, encoded)
        self._add_samples(self._cut(conversation, encoded.samples))

    def _add_samples(self, samples: Sequence[Sample]) -> None:
        tally, learned, tokens = self.tally, self.tally.learned, len(self.samples.tokens)
        kept = sum(map(self._keep, samples))
        if not kept:
            self._drop(f"nothing to learn within seq_len={self._rules.seq_len}")
        # A sample's first token never has a loss.
        tally.whole += bool(kept) and tally.learned - learned == len(self.samples.tokens) - tokens - kept

    def _cut(self, conversation: Conversation, samples: tuple[Sample, ...]) -> list[Sample]:
        """Samples as long as they may be: a document in pieces, others without their end."""
        seq_len, tally = self._rules.seq_len, self.tally
        bounded = [self._bounded(sample) for sample in samples] if self._rules.bounds_parts else list(samples)
        if all(len(sample.tokens) <= seq_len for sample in bounded):
            return bounded
        if is_document(conversation):
            pieces = list(pieces_of(bounded[0], seq_len, opening=self._opening))
            tally.documents, tally.pieces = tally.documents + 1, tally.pieces + len(pieces)
            return pieces
        tally.truncated += 1
        self.lost.append(sum(max(0, len(sample.tokens) - seq_len) for sample in bounded))
        return [Sample(sample.tokens[:seq_len], sample.learn) for sample in bounded]

    def _bounded(self, sample: Sample) -> Sample:
        """A sample with its prompt and its answer cut at their own lengths, on the right, as QLoRA's script does."""
        rules, count = self._rules, len(sample.tokens)
        begin = sample.learn.index(True) if True in sample.learn else count
        source, target = min(begin, rules.source_max_len or begin), min(count, begin + (rules.target_max_len or count))
        self.tally.cut_prompts += source < begin
        self.tally.cut_answers += target < count
        tokens, learn = sample
        return Sample(tokens[:source] + tokens[begin:target], learn[:source] + learn[begin:target])

    def _keep(self, sample: Sample) -> bool:
        """Add a sample; whether anything is to be learned of it."""
        tokens, learn = sample
        prompt = learn.index(True) if True in learn else len(learn)
        self.tally.longest_prompt = max(self.tally.longest_prompt, prompt)
        labels = [token if own or self._all else IGNORED for token, own in zip(tokens, learn, strict=False)]
        count = len(labels) - labels.count(IGNORED) - (labels[:1] != [IGNORED] and bool(labels))
        if count:
            self.samples.add(tokens, labels, count)
            self.tally.learned += count
        return bool(count)

    def _add_bad(self, error: DataError) -> None:
        self._bad.add(error)
        self.tally.bad = self._bad.count
        self.tally.first_bad = [(each.message, each.try_) for each in self._bad.first]

    def _drop(self, reason: str) -> None:
        count_up(self.tally.dropped, (reason,))

    def _require_no_marks(self, conversation: Conversation) -> None:
        """Refuse turns that are marked as not learned, because with `train_on_source` everything is."""
        marked = any(turn.role == "assistant" and not turn.learn and not turn.is_empty for turn in conversation.turns)
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

    def _require_one_answer(self, conversation: Conversation, samples: tuple[Sample, ...]) -> None:
        """Refuse several answers where prompt and answer have lengths of their own."""
        if not self._rules.bounds_parts:
            return
        if (answers := sum(_runs(sample.learn) for sample in samples)) > 1:
            raise DataError(
                f"{conversation.where} has {answers} answers, and data.source_max_len and data.target_max_len are for "
                "records with one",
                try_="--set data.source_max_len=auto --set data.target_max_len=auto",
            )

    def _require_rows(self, conversation: Conversation, samples: tuple[Sample, ...]) -> None:
        rows = self._rules.rows
        for sample in samples:
            largest = max(sample.tokens, default=0)
            if rows is not None and largest >= rows:
                token = self._tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"{conversation.where}: {token!r} is token {largest:,}, and the model has {rows:,} rows",
                    try_=f"records without {token!r}, or the tokenizer that belongs to these weights",
                )


def is_document(conversation: Conversation) -> bool:
    """Whether a record is plain text, of which every part is as good a sample as the whole."""
    return conversation.format == "text" and conversation.style == "plain"


def pieces_of(document: Sample, seq_len: int, *, opening: Sequence[int]) -> Iterator[Sample]:
    """A document in pieces of `seq_len` tokens, each behind the begin-of-text token if the document is.

    The last piece is shorter, and takes a token of the piece before if it would be one token without a loss.
    """
    tokens, learn = document
    head = list(opening) if opening and tokens[: len(opening)] == list(opening) else []
    unlearned, room = [False] * len(head), max(1, seq_len - len(head))
    for start in range(len(head), len(tokens), room):
        first = start - (start == len(tokens) - 1 and not head)
        part = slice(first, start + room)
        yield Sample((head + tokens[part])[:seq_len], unlearned + learn[part])


def _runs(learn: Sequence[bool]) -> int:
    """How many times learned tokens begin."""
    return sum(own and not before for before, own in pairwise((False, *learn)))


def notes_of(tally: Tally, rules: SampleRules) -> Iterator[str]:
    """What was cut and dropped, for the user."""
    total = f"of {tally.records:,} records"
    if tally.documents:
        documents = counted(tally.documents, "document")
        yield f"{documents} became {tally.pieces:,} pieces of at most {rules.seq_len:,} tokens"
    if tally.cut_prompts:
        yield (
            f"{tally.cut_prompts:,} {total} had their prompt cut at source_max_len={rules.source_max_len}, on the "
            "right: what asks for the answer goes first"
        )
    if tally.cut_answers:
        yield f"{tally.cut_answers:,} {total} had their answer cut at target_max_len={rules.target_max_len}"
    if tally.truncated:
        yield f"{tally.truncated:,} {total} were cut at seq_len={rules.seq_len}"
    for reason, count in tally.dropped.items():
        yield f"{count:,} {total} were dropped: {reason}"
    if tally.whole and not rules.train_on_source:
        yield f"every token of {tally.whole:,} {total} has a loss: nothing in them is given"


def _nothing_left(tally: Tally, rules: SampleRules) -> DataError:
    """The error for data of which no sample is left."""
    if not tally.records:
        return DataError("the data holds no conversation")
    if tally.bad == tally.records:
        first, try_ = tally.first_bad[0]
        none = f"all {tally.records:,} records cannot be used, and data.skip_bad left out every one"
        return DataError(f"{none}: {first}", try_=try_)
    cut = f"nothing to learn within seq_len={rules.seq_len}"
    if tally.dropped.get(cut) == tally.records:
        return DataError(
            f"all {tally.records:,} records were dropped: none has a token to learn within seq_len={rules.seq_len}; "
            f"the longest prompt has {tally.longest_prompt:,} tokens",
            try_=f"--seq-len {2 * tally.longest_prompt}",
        )
    dropped = {**tally.dropped, **({"it cannot be used": tally.bad} if tally.bad else {})}
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items())
    alone = next(iter(dropped)) if len(dropped) == 1 else reasons
    return DataError(
        f"all {tally.records:,} records were dropped: {alone}", try_="records with an answer that is to be learned"
    )
