"""Reads a data set as training would, and tells what is in it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from qdist.core.data.conversation import Conversation
from qdist.core.data.overview import Overview, Piece, Shown, histogram
from qdist.core.data.reading import reading_of
from qdist.core.data.records import BadRecords
from qdist.core.errors import DataError
from qdist.core.requests import ShowData
from qdist.core.spec.run_spec import RunSpec
from qdist.host.data.chat_templates import find_template
from qdist.host.data.sources import DataSource, data_notes, parts_of, read_source, sources_of
from qdist.host.sources.models import locate
from qdist.runtime.data.chat_template import require_template
from qdist.runtime.data.encode import Encoded, Encoder, Sample
from qdist.runtime.data.stream import divide
from qdist.runtime.data.tokenizer import open_tokenizer, repair
from qdist.runtime.data.wording import Told, give_template
from qdist.runtime.model.classes import content_of
from qdist.runtime.model.skeleton import open_config
from qdist.runtime.quantize.materialize import materialize

_NAMED = 3


def run(request: ShowData) -> Overview:
    """Handle a request to show data."""
    tokenizer = _tokenizer_of(request.spec) if request.spec.model else None
    return overview(request.spec, tokenizer, samples=request.samples, limit=request.limit)


def _tokenizer_of(spec: RunSpec) -> Any:
    """The tokenizer that training would use. Raises ModelError as `prepare` does."""
    folder: Path = materialize(locate(spec.model), trusted=spec.trust_remote_code)
    tokenizer = open_tokenizer(folder, f"{spec.model} has no tokenizer to read data with")
    repair(tokenizer, content_of(open_config(folder)), new_tokens=spec.new_tokens)
    if spec.data.template:
        give_template(tokenizer, find_template(spec.data.template))
    require_template(tokenizer)
    return tokenizer


def overview(spec: RunSpec, tokenizer: Any, *, samples: int, limit: int | None) -> Overview:
    """What the records of a spec's data come to.

    tokenizer: None to count characters. samples: how many to show. limit: records to look at; None for all.
    """
    found, reading = _Pass(spec, tokenizer, samples), reading_of(spec.data, spec.format)
    for source in sources_of(spec.data):
        found.begin(source)
        for number, conversation in enumerate(read_source(source, reading, seed=spec.seed)):
            if number == limit:
                found.whole = False
                break
            found.add(conversation)
    return found.told()


class _Pass:
    """One pass over the records."""

    def __init__(self, spec: RunSpec, tokenizer: Any, samples: int) -> None:
        self._spec, self._tokenizer, self._wanted = spec, tokenizer, samples
        self._encoder = Encoder(tokenizer) if tokenizer else None
        self._wording = Told(tokenizer) if tokenizer else None
        self._bad, self._formats, self._dropped = BadRecords(), Counter[str](), Counter[str]()
        self._unused: dict[str, None] = {}
        self._first: dict[bytes, str] = {}
        self._twice = list[tuple[str, str]]()
        self._shown, self._lengths, self._cut_by, self._digests = list[Shown](), list[int](), list[int](), list[bytes]()
        self._records = self._learned = self._duplicates = 0
        self._sources, self._firsts = list[DataSource](), list[int]()
        self.whole = True
        self._bad_split = ""

    def begin(self, source: DataSource) -> None:
        """Go on to the records of the next source."""
        self._sources.append(source)
        self._firsts.append(len(self._lengths))

    def add(self, conversation: Conversation | DataError) -> None:
        """Look at the next record."""
        self._records += 1
        if isinstance(conversation, DataError):
            self._bad.add(conversation)
            return
        try:
            encoded = self._encoded(conversation)
        except DataError as error:
            self._bad.add(error)
            return
        self._formats[conversation.format] += 1
        self._unused |= dict.fromkeys(conversation.unused)
        digest = _digest(conversation)
        self._compare(digest, conversation.where)
        if not conversation.learns and not self._spec.train.train_on_source:
            self._dropped[conversation.why_nothing] += 1
            return
        if encoded is None:
            self._add_text(conversation, digest)
            return
        if self._wording:
            self._wording.add(conversation, encoded)
        for sample in encoded.samples:
            self._add_sample(conversation, sample, digest)

    def _encoded(self, conversation: Conversation) -> Encoded | None:
        return self._encoder.encode(conversation) if self._encoder else None

    def _compare(self, digest: bytes, where: str) -> None:
        before = self._first.setdefault(digest, where)
        if before != where:
            self._duplicates += 1
            if len(self._twice) < _NAMED:
                self._twice.append((where, before))

    def _add_sample(self, conversation: Conversation, sample: Sample, digest: bytes) -> None:
        length, most = len(sample.tokens), self._spec.seq_len
        learn = [True] * length if self._spec.train.train_on_source else sample.learn
        learned = sum(learn[1:most])  # a sample's first token never has a loss
        if not learned:
            self._dropped[f"nothing to learn within seq_len={most}"] += 1
            return
        self._count(length, learned, digest)
        if length > most:
            self._cut_by.append(length - most)
        if len(self._shown) < self._wanted:
            pieces = tuple(self._pieces(sample.tokens[:most], learn))
            self._shown.append(
                Shown(
                    where=conversation.where, tokens=length, learned=learned, pieces=pieces, cut=max(0, length - most)
                )
            )

    def _add_text(self, conversation: Conversation, digest: bytes) -> None:
        """Count a record in characters, worded without a chat template."""
        pieces = tuple(Piece(part.text, part.learn) for part in conversation.segments())
        self._count(
            sum(len(piece.text) for piece in pieces),
            sum(len(piece.text) for piece in pieces if piece.learned),
            digest,
        )
        if len(self._shown) < self._wanted:
            self._shown.append(Shown(where=conversation.where, tokens=0, learned=0, pieces=pieces))

    def _count(self, length: int, learned: int, digest: bytes) -> None:
        self._lengths.append(length)
        self._digests.append(digest)
        self._learned += learned

    def _pieces(self, tokens: list[int], learn: list[bool]) -> Iterator[Piece]:
        """Text of runs of tokens that are alike; a character of several tokens is of the run that it ends in."""
        at, before = 0, ""
        for learned, group in groupby(learn[: len(tokens)]):
            at += len(list(group))
            text = self._tokenizer.decode(tokens[:at], clean_up_tokenization_spaces=False)
            whole = text.rstrip("\ufffd") if at < len(tokens) else text
            yield Piece(whole[len(before) :], learned)
            before = whole

    def told(self) -> Overview:
        """What was seen."""
        held_out, overlap = self._overlap()
        wording, notes = self._wording.summed_up(self._records) if self._wording and self._lengths else (None, ())
        errors = self._bad.first
        return Overview(
            source=self._spec.data.path,
            records=self._records,
            whole=self.whole,
            samples=len(self._lengths),
            formats=tuple(self._formats.most_common()),
            wording=str(wording) if wording else "",
            tokenizer=self._spec.model if self._tokenizer else "",
            seq_len=self._spec.seq_len,
            shown=tuple(self._shown),
            lengths=histogram(self._lengths),
            median=round(median(self._lengths)) if self._lengths else 0,
            longest=max(self._lengths, default=0),
            length=sum(self._lengths),
            learned=self._learned,
            cut=len(self._cut_by),
            cut_median=round(median(self._cut_by)) if self._cut_by else 0,
            cut_most=max(self._cut_by, default=0),
            dropped=tuple(self._dropped.most_common()),
            duplicates=self._duplicates,
            first_duplicates=tuple(self._twice),
            held_out=held_out,
            overlap=overlap,
            bad=self._bad.count,
            first_bad=tuple(error.message for error in errors),
            bad_try=next((error.try_ for error in errors if error.try_), ""),
            allowed_bad=self._spec.data.skip_bad,
            notes=tuple(self._notes(notes)),
        )

    def _overlap(self) -> tuple[int, int]:
        """(held-out samples, those of them that say what a training sample says)."""
        parts = parts_of(self._sources, (*self._firsts, len(self._digests)))
        try:
            train, held_out = divide(
                len(self._digests), parts, held_out=self._spec.train.held_out, seed=self._spec.seed
            )
        except DataError as error:
            self._bad_split = error.message
            return 0, 0
        trained = {self._digests[index] for index in train.tolist()}
        return len(held_out), sum(self._digests[index] in trained for index in held_out.tolist())

    def _notes(self, of_wording: Iterable[str]) -> Iterator[str]:
        yield from data_notes(self._spec.data)
        if self._bad_split:
            yield self._bad_split
        if self._unused:
            yield f"not used: {', '.join(islice(self._unused, 20))}"
        yield from of_wording


def _digest(conversation: Conversation) -> bytes:
    """Equal for conversations that say the same in the same turns, wherever they come from."""
    return hashlib.blake2b(msgspec.json.encode((conversation.turns, conversation.tools)), digest_size=8).digest()
