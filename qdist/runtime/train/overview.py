"""Reads a data set as training would, and tells what is in it."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

import msgspec

from qdist.core.data.conversation import Conversation, Wording
from qdist.core.data.overview import Overview, Piece, Shown, SourceSeen, histogram
from qdist.core.data.reading import reading_of
from qdist.core.data.records import BadRecords
from qdist.core.data.templates import NamedTemplate
from qdist.core.errors import DataError
from qdist.core.requests import ShowData
from qdist.core.spec.run_spec import RunSpec
from qdist.host.data.chat_templates import find_template
from qdist.host.data.sources import DataSource, data_notes, parts_of, read_source, sources_of
from qdist.runtime.data.chat_template import require_template
from qdist.runtime.data.stream import divide, stream_of
from qdist.runtime.data.tokenized import IGNORED
from qdist.runtime.data.tokenizer import text_settings
from qdist.runtime.data.tokenizing import RecordPass, SampleArrays, SampleRules, Tally, notes_of, sample_rules
from qdist.runtime.data.wording import Told, require_worded
from qdist.runtime.train.prepare import opened_model

_NAMED = 3


def run(request: ShowData) -> Overview:
    """Handle a request to show data."""
    spec = request.spec
    tokenizer, rules = _tokenizer_of(spec) if spec.model else (None, None)
    return overview(spec, tokenizer, rules, samples=request.samples, limit=request.limit)


def _tokenizer_of(spec: RunSpec) -> tuple[Any, SampleRules]:
    """The tokenizer that training would use, and what decides its samples. Raises ModelError as `prepare` does."""
    made = opened_model(spec)
    require_template(made.tokenizer)
    return made.tokenizer, sample_rules(spec, rows=made.rows or int(text_settings(made.config)["vocab_size"]))


def overview(spec: RunSpec, tokenizer: Any, rules: SampleRules | None, *, samples: int, limit: int | None) -> Overview:
    """What the records of a spec's data come to.

    tokenizer, rules: None to count characters. samples: how many to show. limit: records of a source to look at; None
    for all.
    """
    found, reading = _Look(spec, tokenizer, rules, samples), reading_of(spec.data, spec.format)
    template = find_template(spec.data.template) if spec.data.template and tokenizer else None
    for source in sources_of(spec.data):
        found.begin(source)
        for number, conversation in enumerate(read_source(source, reading, seed=spec.seed)):
            if number == limit:
                found.whole = False
                break
            found.add(conversation)
    return found.told(template)


class _Split(NamedTuple):
    """Indices of samples."""

    train: list[int]
    held_out: list[int]


class _Look:
    """One look at all records."""

    def __init__(self, spec: RunSpec, tokenizer: Any, rules: SampleRules | None, samples: int) -> None:
        self._spec, self._tokenizer, self._rules, self._wanted = spec, tokenizer, rules, samples
        self._reader = RecordPass(tokenizer, rules) if rules else None
        self._bad, self._dropped, self._tools = BadRecords(), Counter[str](), 0
        self._first: dict[bytes, str] = {}
        self._twice = list[tuple[str, str]]()
        self._shown, self._lengths, self._digests = list[Shown](), array("q"), list[bytes]()
        self._learned = self._duplicates = self._cut = 0
        self._sources, self._firsts = list[DataSource](), list[int]()
        self._records, self._formats = list[int](), list[Counter[str]]()
        self.whole = True

    def begin(self, source: DataSource) -> None:
        """Go on to the records of the next source."""
        self._sources.append(source)
        self._firsts.append(len(self._lengths))
        self._records.append(0)
        self._formats.append(Counter())

    def add(self, conversation: Conversation | DataError) -> None:
        """Look at the next record."""
        self._records[-1] += 1
        bad = self._reader.tally.bad if self._reader else 0
        if self._reader:
            self._reader.add(conversation)
        elif isinstance(conversation, DataError):
            self._bad.add(conversation)
        if isinstance(conversation, DataError) or (self._reader and self._reader.tally.bad > bad):
            return
        digest = _digest(conversation)
        self._compare(digest, conversation.where)
        self._formats[-1][conversation.format] += 1
        if self._reader:
            self._add_samples(self._reader, conversation, digest)
        else:
            self._add_text(conversation, digest)

    def _compare(self, digest: bytes, where: str) -> None:
        if digest not in self._first:
            self._first[digest] = where
            return
        self._duplicates += 1
        if len(self._twice) < _NAMED:
            self._twice.append((where, self._first[digest]))

    def _add_samples(self, reader: RecordPass, conversation: Conversation, digest: bytes) -> None:
        """Count and show the samples of a record, which the reader then forgets."""
        found, stop, cut = reader.samples, 0, sum(reader.lost[self._cut :])
        reader.samples, self._cut = SampleArrays(), len(reader.lost)
        for length, learned in zip(found.lengths, found.learned, strict=True):
            start, stop = stop, stop + length
            own = digest if len(found.lengths) == 1 else _digest_of(found.tokens[start:stop])
            self._count(length, learned, own)
            if len(self._shown) < self._wanted:
                learn = [label != IGNORED for label in found.labels[start:stop]]
                pieces = tuple(self._pieces(found.tokens[start:stop].tolist(), learn))
                shown = Shown(where=conversation.where, tokens=length, learned=learned, pieces=pieces, cut=cut)
                self._shown.append(shown)

    def _add_text(self, conversation: Conversation, digest: bytes) -> None:
        """Count a record in characters, worded without a chat template."""
        if conversation.has_tools:
            self._tools += 1
            return
        everything = self._spec.train.train_on_source
        pieces = tuple(Piece(part.text, part.learn or everything) for part in conversation.segments())
        learned = sum(len(piece.text) for piece in pieces if piece.learned)
        if not learned:
            self._dropped[conversation.why_nothing] += 1
            return
        self._count(sum(len(piece.text) for piece in pieces), learned, digest)
        if len(self._shown) < self._wanted:
            self._shown.append(Shown(where=conversation.where, tokens=0, learned=0, pieces=pieces))

    def _count(self, length: int, learned: int, digest: bytes) -> None:
        self._lengths.append(length)
        self._digests.append(digest)
        self._learned += learned

    def _pieces(self, tokens: list[int], learn: list[bool]) -> Iterator[Piece]:
        """Text of runs of tokens that are alike; a character of several tokens is of the run that it ends in."""
        at, before = 0, ""
        for learned, group in groupby(learn):
            at += len(list(group))
            text = self._tokenizer.decode(tokens[:at], clean_up_tokenization_spaces=False)
            whole = text.rstrip("\ufffd") if at < len(tokens) else text
            yield Piece(whole[len(before) :], learned)
            before = whole

    def told(self, template: NamedTemplate | None) -> Overview:
        """What was seen. template: the chat template that was asked for."""
        tally = self._reader.tally if self._reader else Tally()
        lost = self._reader.lost if self._reader else array("q")
        bad = tally.bad_records() if self._reader else self._bad
        wording, notes = (
            Told(self._tokenizer, tally.wording).summed_up(tally.records) if tally.wording.ways else (None, ())
        )
        split, refusal = self._split(wording, template)
        held_out, overlap = self._overlap(split)
        return Overview(
            source=self._spec.data.path,
            records=sum(self._records),
            whole=self.whole,
            samples=len(self._lengths),
            formats=tuple(sum(self._formats, Counter[str]()).most_common()),
            sources=tuple(self._seen()),
            wording=str(wording) if wording else "",
            tokenizer=self._spec.model if self._tokenizer else "",
            seq_len=self._spec.seq_len,
            shown=tuple(self._shown),
            lengths=histogram(self._lengths),
            median=round(median(self._lengths)) if self._lengths else 0,
            longest=max(self._lengths, default=0),
            length=sum(self._lengths),
            learned=self._learned,
            cut=len(lost),
            cut_median=round(median(lost)) if lost else 0,
            cut_most=max(lost, default=0),
            dropped=tuple(self._dropped.most_common()),
            unread=self._tools,
            duplicates=self._duplicates,
            first_duplicates=tuple(self._twice),
            held_out=held_out,
            overlap=overlap,
            bad=bad.count,
            first_bad=tuple(error.message for error in bad.first),
            bad_try=next((error.try_ for error in bad.first if error.try_), ""),
            allowed_bad=self._spec.data.skip_bad,
            notes=(*data_notes(self._spec.data), *(notes_of(tally, self._rules) if self._rules else ()), *notes),
            refusal=refusal.message if refusal else "",
            refusal_try=refusal.try_ if refusal else "",
        )

    def _seen(self) -> Iterator[SourceSeen]:
        for source, records, formats in zip(self._sources, self._records, self._formats, strict=True):
            told = tuple(formats.most_common())
            yield SourceSeen(name=str(source.part), records=records, formats=told, held_out=source.held_out)

    def _split(self, wording: Wording | None, template: NamedTemplate | None) -> tuple[_Split | None, DataError | None]:
        """Training and held-out samples, or why training would refuse what it can read; neither if none was seen."""
        spec, count = self._spec, len(self._digests)
        if not count:
            return None, None
        parts = parts_of(self._sources, (*self._firsts, count))
        try:
            if template:
                require_worded(wording, template)
            train, held_out = divide(count, parts, held_out=spec.train.held_out, seed=spec.seed)
            stream_of(train, parts, seed=spec.seed)
        except DataError as error:
            return None, error if self.whole and not self._tools else None
        return _Split(train.tolist(), held_out.tolist()), None

    def _overlap(self, split: _Split | None) -> tuple[int, int]:
        """(held-out samples, those of them that say what a training sample says)."""
        if split is None:
            return 0, 0
        trained = {self._digests[index] for index in split.train}
        return len(split.held_out), sum(self._digests[index] in trained for index in split.held_out)


def _digest(conversation: Conversation) -> bytes:
    """Equal for conversations that say the same in the same turns, wherever they come from."""
    return _digest_of(msgspec.json.encode((conversation.turns, conversation.tools)))


def _digest_of(content: "bytes | array[int]") -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
