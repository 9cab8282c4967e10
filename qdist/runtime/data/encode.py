"""The tokens of a conversation, and which of them are learned."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from qdist.core.data.conversation import Conversation, Role, Segment
from qdist.core.errors import DataError, ModelError
from qdist.runtime.data.chat_template import LearnedAnswer, Rendering, render


class Sample(NamedTuple):
    """One sample before truncation: token ids, and whether each one's loss counts."""

    tokens: list[int]
    learn: list[bool]


class End(NamedTuple):
    """What ends an answer."""

    mark: str
    """Text of the marker; empty if the end-of-text token was added."""
    token: int | None
    """The marker's token, or its first one if that is special; None if it is ordinary text."""


class Encoded(NamedTuple):
    """The encoded form of one conversation."""

    samples: tuple[Sample, ...]
    """One sample; one per answer if later turns change the text or tokens of earlier answers."""
    chat: bool
    """Whether a chat template rendered it."""
    ends: tuple["End", ...] = ()
    """The end of each learned turn."""
    leads: tuple[str, ...] = ()
    """The text between header and answer of each learned turn."""
    left_out: frozenset[Role] = frozenset()
    """Roles whose turns the chat template omits."""
    thoughts: int = 0
    doubled: int = 0
    toolless: bool = False
    """See `Rendered`."""


class Encoder:
    """Tokenizes conversations, through the tokenizer's chat template if there is one and it applies."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(token for token, _ in added)}
        self._dividing = {token for token, own in added if own.special and not own.normalized}

    def encode(self, conversation: Conversation) -> Encoded:
        """The tokens of one conversation, not truncated.

        Raises DataError for a conversation that the template does not write as it is, ModelError for a tokenizer that
        cannot say which tokens are whose, or where a text ends.
        """
        if conversation.verbatim or not self._tokenizer.chat_template:
            sample, doubled = _of_segments(conversation, self._tokenizer)
            return Encoded((sample,), chat=False, doubled=doubled)
        if not self._tokenizer.is_fast:
            raise ModelError(
                "a chat template needs a fast tokenizer, and this one is not", try_="add its tokenizer.json"
            )
        rendered = render(conversation, self._tokenizer)
        written = [own for part in rendered.parts for own in self._of_rendering(part, where=conversation.where)]
        return Encoded(
            tuple(sample for sample, _ in written),
            chat=True,
            ends=tuple(end for _, ends in written for end in ends),
            leads=tuple(answer.lead for part in rendered.parts for answer in part.answers),
            left_out=rendered.left_out,
            thoughts=rendered.thoughts,
            doubled=rendered.doubled,
            toolless=rendered.toolless,
        )

    def _of_rendering(self, part: Rendering, *, where: str) -> list[tuple[Sample, tuple[End, ...]]]:
        """One sample, or one per answer, with the ends of its answers.

        The tokens before an answer are the ones that a model is given when it is asked for it.
        """
        whole = self._tokens(part.text)
        if not part.answers:
            return [(Sample(whole.ids, [False] * len(whole.ids)), ())]
        for tokens in chain((whole,), self._in_pieces(part, whole)):
            spans = self._spans(tokens, part)
            if spans is not None:
                return [self._learned(tokens, part, spans)]
        *earlier, last = part.answers
        if not earlier:
            raise DataError(
                f"{where}: a token spans the header of an answer and its first characters, and a model that is given "
                "the header could never write it",
                try_="answers, and a chat_template's headers of them, without white space where they meet",
            )
        alone = [*(Rendering(part.text[: answer.end], (answer,)) for answer in earlier), Rendering(part.text, (last,))]
        return [own for one in alone for own in self._of_rendering(one, where=where)]

    def _tokens(self, text: str) -> "_Tokens":
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return _Tokens(encoded["input_ids"], encoded["offset_mapping"])

    def _in_pieces(self, part: Rendering, whole: "_Tokens") -> Iterator["_Tokens"]:
        """The last answer tokenized separately from its prompt, for text in which a token would span both.

        First alone, then behind a special token, where tokenizers that begin a text with a space put none. Pieces that
        say something else than the whole are none.
        """
        start, said = part.answers[-1].start, self._said(whole.ids)
        head = self._tokens(part.text[:start])
        for before in ("", self._tokenizer.eos_token or ""):
            tokens = self._tokens(before + part.text[start:])
            skipped, moved = bool(before), start - len(before)
            offsets = [(first + moved, last + moved) for first, last in tokens.offsets[skipped:]]
            joined = _Tokens(head.ids + tokens.ids[skipped:], head.offsets + offsets)
            if self._said(joined.ids) == said:
                yield joined

    def _said(self, ids: list[int]) -> str:
        said: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return said

    def _spans(self, tokens: "_Tokens", part: Rendering) -> list[tuple[int, int]] | None:
        """The token range of each answer; None if a prompt alone would be tokenized differently."""
        spans = []
        for answer in part.answers:
            begin = self._asked(tokens, part.text, answer.start)
            if begin is None:
                return None
            spans.append((begin, max(begin, bisect_left(tokens.offsets, answer.end, key=_first_character))))
        return spans

    def _asked(self, tokens: "_Tokens", text: str, start: int) -> int | None:
        """Number of tokens before an answer; None if its prompt alone would be tokenized differently.

        The last special token divides the text: what comes before it has no part in what follows, and is not tokenized
        again.
        """
        behind = bisect_left(tokens.offsets, start, key=_first_character)
        at = next((place for place in range(behind - 1, -1, -1) if tokens.ids[place] in self._dividing), 0)
        since = tokens.offsets[at][0] if at else 0
        prompt = self._tokenizer(text[since:start], add_special_tokens=False)["input_ids"]
        count = at + len(prompt)
        # A special token may take in the white space behind it; no other may reach into the answer.
        swallowed = text[start : tokens.offsets[count - 1][1]] if count else ""
        return count if tokens.ids[at:count] == prompt and not swallowed.strip() else None

    def _learned(
        self, tokens: "_Tokens", part: Rendering, spans: list[tuple[int, int]]
    ) -> tuple[Sample, tuple[End, ...]]:
        ids, learn = tokens.ids, [False] * len(tokens.ids)
        for begin, end in spans:
            learn[begin:end] = [True] * (end - begin)
        ends = [self._end(tokens, part.text, *pair) for pair in zip(part.answers, spans, strict=True)]
        if not part.answers[-1].mark and part.answers[-1].end == len(part.text):
            if self._tokenizer.eos_token_id is None:
                raise ModelError(
                    "the chat template writes nothing behind an answer, and the tokenizer has no end-of-text token, so "
                    "nothing would tell the model to stop",
                    try_="an eos_token in its tokenizer_config.json",
                )
            ids, learn = [*ids, self._tokenizer.eos_token_id], [*learn, True]
        return Sample(ids, learn), tuple(ends)

    def _end(self, tokens: "_Tokens", text: str, answer: LearnedAnswer, span: tuple[int, int]) -> End:
        at = answer.end - len(answer.mark)
        place = bisect_left(tokens.offsets, at + 1, *span, key=lambda offset: offset[1])
        if not answer.mark or place == span[1]:
            return End(answer.mark, None)
        (start, stop), token = tokens.offsets[place], tokens.ids[place]
        alone = not text[start:at].strip() and (stop >= answer.end or token in self._special)
        return End(answer.mark, token if alone else None)


class _Tokens(NamedTuple):
    """Token ids, and the character range of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def _first_character(offset: tuple[int, int]) -> int:
    """Position of a token's first character; tokenizers that trim give an all-whitespace token as empty, after it."""
    start, stop = offset
    return start - (start == stop)


def prompt_of_segments(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The tokens of a conversation that awaits a reply, without a chat template."""
    return _of_segments(conversation, tokenizer)[0].tokens


def opening(tokenizer: Any) -> list[int]:
    """The begin-of-text token, if the tokenizer itself prepends one to prompts."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _of_segments(conversation: Conversation, tokenizer: Any) -> tuple[Sample, int]:
    """Each segment tokenized separately, learned ones followed by the end-of-text token (as in QLoRA).

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
        bare = segment.text.rstrip()
        doubled_end = _is_ended(segment) and bare.endswith(tokenizer.eos_token)
        piece = tokenizer(bare if doubled_end else segment.text, add_special_tokens=False)["input_ids"]
        if not tokens and piece[:1] != first:
            tokens, learn = list(first), [False] * len(first)
        ends = doubled_end and piece[-1:] == [end]
        doubled += ends
        piece += [end] * (_is_ended(segment) and not ends)
        tokens += piece
        learn += [segment.learn] * len(piece)
    return Sample(tokens, learn), doubled


def _is_ended(segment: Segment) -> bool:
    return segment.learn or segment.ended
