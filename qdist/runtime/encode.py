"""Which tokens a conversation becomes, and which of them are learned."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from qdist.core.conversation import Conversation, Role, Segment
from qdist.core.errors import DataError, ModelError
from qdist.runtime.chat_template import Rendering, render


class Sample(NamedTuple):
    """One sample before truncation: token ids, and for each whether its loss is taken."""

    tokens: list[int]
    learn: list[bool]


class Encoded(NamedTuple):
    """What one conversation becomes."""

    samples: tuple[Sample, ...]
    """One; one an answer where the chat template writes earlier answers otherwise once later ones follow."""
    chat: bool
    """Whether a chat template wrote it."""
    marks: tuple[str, ...] = ()
    """What ends each learned turn; an empty one where the end-of-text token was added."""
    leads: tuple[str, ...] = ()
    """What stands between header and text of each."""
    left_out: frozenset[Role] = frozenset()
    """Whose turns the chat template does not show."""
    thoughts: int = 0
    doubled: int = 0
    """See `Rendered`."""


def encode(conversation: Conversation, tokenizer: Any) -> Encoded:
    """The tokens of one conversation, uncut, through the chat template where there is one and it applies.

    Raises DataError for a conversation that the template does not write as it is, ModelError for a tokenizer that
    cannot say which tokens are whose, or where a text ends.
    """
    if conversation.verbatim or not tokenizer.chat_template:
        sample, doubled = _of_segments(conversation, tokenizer)
        return Encoded((sample,), chat=False, doubled=doubled)
    if not tokenizer.is_fast:
        raise ModelError("a chat template needs a fast tokenizer, and this one is not", try_="add its tokenizer.json")
    rendered = render(conversation, tokenizer)
    answers = [answer for part in rendered.parts for answer in part.answers]
    return Encoded(
        tuple(_of_rendering(part, tokenizer, where=conversation.where) for part in rendered.parts),
        chat=True,
        marks=tuple(answer.mark for answer in answers),
        leads=tuple(answer.lead for answer in answers),
        left_out=rendered.left_out,
        thoughts=rendered.thoughts,
        doubled=rendered.doubled,
    )


def prompt_of_segments(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The tokens of a conversation that waits for a reply, without a chat template."""
    return _of_segments(conversation, tokenizer)[0].tokens


def opening(tokenizer: Any) -> list[int]:
    """The begin-of-text token, where the tokenizer itself puts one before a prompt."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _of_segments(conversation: Conversation, tokenizer: Any) -> tuple[Sample, int]:
    """Each piece tokenized for itself, the learned ones ended by the end-of-text token (QLoRA's way).

    Begin and end of text that the record holds already are not written again; how many ends were there.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            "the tokenizer has no end-of-text token, so nothing would tell the model to stop",
            try_="an eos_token in its tokenizer_config.json",
        )
    first, doubled = opening(tokenizer), 0
    tokens, learn = list[int](), list[bool]()
    for segment in conversation.segments():
        piece = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        if not tokens and piece[:1] != first:
            tokens, learn = list(first), [False] * len(first)
        ends = _is_ended(segment) and piece[-1:] == [end]
        doubled += ends
        piece += [end] * (_is_ended(segment) and not ends)
        tokens += piece
        learn += [segment.learn] * len(piece)
    return Sample(tokens, learn), doubled


def _is_ended(segment: Segment) -> bool:
    return segment.learn or segment.ended


def _of_rendering(part: Rendering, tokenizer: Any, *, where: str) -> Sample:
    """The tokens of a rendering. Those before an answer are the ones that a model is given when it is asked for it."""
    spans = [(answer.start, answer.end) for answer in part.answers]
    encoded = _tokenized(tokenizer, part.text)
    tokens, learn = encoded["input_ids"], learned_by_offset(encoded["offset_mapping"], spans)
    if any(_prompt(tokenizer, part.text, start) != tokens[: _first(learn, at)] for at, start in _starts(part)):
        tokens, learn = _in_pieces(part, tokenizer, whole=tokens, where=where)
    if part.answers and not part.answers[-1].mark and part.answers[-1].end == len(part.text):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the chat template writes nothing behind an answer, and the tokenizer has no end-of-text token, so "
                "nothing would tell the model to stop",
                try_="an eos_token in its tokenizer_config.json",
            )
        tokens, learn = [*tokens, tokenizer.eos_token_id], [*learn, True]
    return Sample(tokens, learn)


def _starts(part: Rendering) -> list[tuple[int, int]]:
    return list(enumerate(answer.start for answer in part.answers))


def _first(learn: Sequence[bool], number: int) -> int:
    """Where the learned span of a number begins; behind the last token where there is none."""
    starts = [at for at, own in enumerate(learn) if own and (at == 0 or not learn[at - 1])]
    return starts[number] if number < len(starts) else len(learn)


def _tokenized(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)


def _prompt(tokenizer: Any, text: str, start: int) -> list[int]:
    """The tokens of what comes before an answer, alone: what generation feeds."""
    prompt: list[int] = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
    return prompt


def _in_pieces(part: Rendering, tokenizer: Any, *, whole: list[int], where: str) -> tuple[list[int], list[bool]]:
    """Answers tokenized apart from what asks for them, for text in which a token would span both.

    Raises DataError where pieces say something else than the whole, as a tokenizer's that begins texts with a space.
    """
    tokens, learn = list[int](), list[bool]()
    cuts = [0, *(answer.start for answer in part.answers), len(part.text)]
    spans = [(answer.start, answer.end) for answer in part.answers]
    for start, end in pairwise(cuts):
        encoded = _tokenized(tokenizer, part.text[start:end])
        shifted = [(first + start, last + start) for first, last in encoded["offset_mapping"]]
        tokens += encoded["input_ids"]
        learn += learned_by_offset(shifted, [span for span in spans if span[0] >= start and span[0] < end])
    if _said(tokenizer, tokens) != _said(tokenizer, whole):
        raise DataError(
            f"{where}: a token spans the header of an answer and its first characters, and a model that is given the "
            "header could never write it",
            try_="answers without white space at their beginning",
        )
    return tokens, learn


def _said(tokenizer: Any, tokens: list[int]) -> str:
    said: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return said


def learned_by_offset(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether it has a character in one of the spans, both in order.

    offsets: characters of each token. Tokens of one character (an emoji in bytes) share it; a tokenizer that trims
    white space leaves gaps, which belong to the token after them.
    """
    learn, reached, at = [], 0, 0
    for start, end in offsets:
        first, last = min(start, reached), max(end, reached)
        last = max(last, first + 1)
        reached = max(end, reached)
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        learn.append(at < len(spans) and last > spans[at][0])
    return learn
