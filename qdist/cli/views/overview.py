"""A data set as a person reads it: the format found, a few samples with what is learned in colour, lengths, faults."""

from collections.abc import Iterator

from rich.text import Text

from qdist.core.data.overview import Bar, Overview, Shown
from qdist.core.text import counted, first_few, printable

_LEARNED, _HEAD, _FAULT = "green", "bold", "red"
_BAR = 40
_MOST_CHARACTERS = 4000
"""Of a sample that is shown."""


def overview_text(found: Overview, *, marks: bool) -> Text:
    """All of it. marks: what is learned stands between ⟦ and ⟧, where colours do not show it."""
    lines = [
        *_head(found),
        *(part for shown in found.shown for part in _sample(shown, marks=marks)),
        *_lengths(found),
        *_faults(found),
    ]
    return Text("\n").join(lines)


def _head(found: Overview) -> Iterator[Text]:
    count = counted(found.records, "record") + ("" if found.whole else ", the first ones")
    if not found.sources[1:]:
        yield _named("data", f"{found.source}: {count}{_formats(found.formats)}")
    else:
        yield _named("data", f"{count} of {len(found.sources)} sources")
        yield from _sources(found)
    if found.wording:
        yield _named("worded", found.wording)
    if found.tokenizer:
        yield _named("tokens", f"of {found.tokenizer}, up to seq_len={found.seq_len} a sample")
    else:
        yield _named("tokens", "none: --model says whose; lengths are characters, without a chat template")


def _sources(found: Overview) -> Iterator[Text]:
    for source in found.sources:
        use = ", evaluated on" if source.held_out else ""
        yield _named("", f"{source.name}: {counted(source.records, 'record')}{_formats(source.formats)}{use}")


def _formats(formats: tuple[tuple[str, int], ...]) -> str:
    return "".join(f", {name} ({number:,})" if formats[1:] else f", {name}" for name, number in formats)


def _named(name: str, text: str) -> Text:
    return Text.assemble((f"{name:9}", "bold"), printable(text))


def _sample(shown: Shown, *, marks: bool) -> Iterator[Text]:
    yield Text()
    size = f"   {shown.tokens:,} tokens, {shown.learned:,} learned" if shown.tokens else ""
    yield Text.assemble((printable(shown.where), _HEAD), size + (f", {shown.cut:,} cut" if shown.cut else ""))
    text, left = Text(), _MOST_CHARACTERS
    for piece in shown.pieces:
        if not left:
            break
        words = printable(piece.text[:left])
        left -= len(piece.text[:left])
        text.append(f"⟦{words}⟧" if piece.learned and marks else words, _LEARNED if piece.learned else "")
    if sum(len(piece.text) for piece in shown.pieces) > _MOST_CHARACTERS:
        text.append("...", "dim")
    yield text


def _lengths(found: Overview) -> Iterator[Text]:
    if not found.lengths:
        return
    unit = "tokens" if found.tokenizer else "characters"
    yield Text()
    yield Text.assemble(("lengths", _HEAD), f"   {unit} of {counted(found.samples, 'sample')}: ", _spread(found))
    most = max(bar.count for bar in found.lengths)
    digits = len(f"{found.longest:,}")
    for bar in found.lengths:
        blocks = "█" * -(-bar.count * _BAR // most)
        late = bool(found.tokenizer) and bar.low >= found.seq_len
        yield Text.assemble(
            _range(bar, found.longest, digits), (f"{blocks:{_BAR}}", _FAULT if late else "cyan"), f" {bar.count:,}"
        )
    share = f"{found.learned / found.length:.0%}" if found.length else "0 %"
    yield _named("learned", f"{found.learned:,} of {found.length:,} {unit} ({share.replace('%', ' %')})")
    if found.cut:
        yield _named(
            "cut",
            f"{counted(found.cut, 'record')}: {found.cut_median:,} tokens lost in the median, "
            f"{found.cut_most:,} at most",
        )


def _range(bar: Bar, longest: int, digits: int) -> str:
    """The lengths that a bar counts, none above the longest there is."""
    last = min(bar.high - 1, longest)
    first = "" if last == bar.low else f"{bar.low:,} to "
    return f"{first:>{digits + len(' to ')}}{last:{digits},}  "


def _spread(found: Overview) -> str:
    return f"{found.median:,} in the median, {found.longest:,} at most"


def _faults(found: Overview) -> Iterator[Text]:
    yield Text()
    for reason, count in found.dropped:
        yield _named("dropped", f"{count:,} of {found.records:,}: {reason}")
    if found.unread:
        what = counted(found.unread, "record")
        yield _named("tools", f"{what} of {found.records:,} with tools, which only a chat template writes: --model M")
    if found.duplicates:
        pairs = first_few(
            [" = ".join(place.removeprefix(f"{found.source}, ") for place in two) for two in found.first_duplicates]
        )
        yield _named("twice", f"{counted(found.duplicates, 'record')} with the words of an earlier one: {pairs}")
    if found.held_out:
        same = f"; {found.overlap:,} with the words of a training sample" if found.overlap else ", none in training"
        yield _named("held out", counted(found.held_out, "sample") + same)
    for note in found.notes:
        yield _named("note", note)
    if found.refusal:
        yield Text.assemble((f"{'refused':9}", _FAULT), printable(found.refusal))
    if found.bad:
        allowed = f" (data.skip_bad={found.allowed_bad} are left out)" if found.allowed_bad >= found.bad else ""
        yield Text.assemble((f"{'bad':9}", _FAULT), f"{counted(found.bad, 'record')} cannot be used{allowed}:")
        for message in found.first_bad:
            yield Text(f"{'':9}{printable(message)}")
        if found.bad > len(found.first_bad):
            yield Text(f"{'':9}and {found.bad - len(found.first_bad):,} more")
