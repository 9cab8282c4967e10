"""Which tokens a conversation becomes, and which of them are learned."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from qdist.core.errors import DataError, ModelError
from qdist.core.records import Conversation
from qdist.runtime.tokenized import IGNORED, Summary, TokenizedSet


class Encoded(NamedTuple):
    """One sample before truncation: token ids, and for each whether its loss is taken."""

    tokens: list[int]
    learn: list[bool]


def tokenize(
    conversations: Iterable[Conversation], tokenizer: Any, *, seq_len: int, train_on_source: bool
) -> TokenizedSet:
    """Tokenize for causal training, with the loss on the assistant's turns only, or on all with `train_on_source`.

    tokenizer: a transformers tokenizer; the chat template, where it has one, needs a fast one.
    seq_len: samples are cut there, on the right. One that has nothing left to learn is dropped and counted.

    Raises DataError when nothing is left at all, or when the chat template does not show which tokens are whose.
    """
    tokens, labels, offsets = array("i"), array("i"), array("q", [0])
    records = truncated = learned = longest_prompt = 0
    for conversation in conversations:
        sample = encode(conversation, tokenizer)
        records += 1
        truncated += len(sample.tokens) > seq_len
        longest_prompt = max(longest_prompt, _prompt_tokens(sample))
        kept = _labels(sample, seq_len=seq_len, train_on_source=train_on_source)
        if count := sum(label != IGNORED for label in kept[1:]):
            tokens.extend(sample.tokens[:seq_len])
            labels.extend(kept)
            offsets.append(len(tokens))
            learned += count
    if len(offsets) == 1:
        raise _nothing_left(records, seq_len=seq_len, longest_prompt=longest_prompt)
    summary = Summary(records=records, dropped=records - len(offsets) + 1, truncated=truncated,
                      tokens=len(tokens), learned_tokens=learned)  # fmt: skip
    return TokenizedSet(
        torch.frombuffer(tokens, dtype=torch.int32),
        torch.frombuffer(labels, dtype=torch.int32),
        torch.frombuffer(offsets, dtype=torch.int64),
        summary,
    )


def encode(conversation: Conversation, tokenizer: Any) -> Encoded:
    """The tokens of one conversation, uncut, through the chat template where there is one and it applies."""
    if conversation.verbatim or not tokenizer.chat_template:
        return _encode_segments(conversation, tokenizer)
    return _encode_chat(conversation, tokenizer)


def _labels(sample: Encoded, *, seq_len: int, train_on_source: bool) -> list[int]:
    """The labels of a sample cut at `seq_len`: its tokens where they are learned, else -100."""
    pairs = zip(sample.tokens[:seq_len], sample.learn, strict=False)
    return [token if learn or train_on_source else IGNORED for token, learn in pairs]


def _encode_segments(conversation: Conversation, tokenizer: Any) -> Encoded:
    """Each piece tokenized for itself, the learned ones ended by the end-of-text token (QLoRA's way)."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token, so nothing would tell the model to stop")
    tokens = _opening(tokenizer)
    learn = [False] * len(tokens)
    for segment in conversation.segments():
        piece = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        piece += [tokenizer.eos_token_id] * segment.learn
        tokens += piece
        learn += [segment.learn] * len(piece)
    return Encoded(tokens, learn)


def _opening(tokenizer: Any) -> list[int]:
    """The begin-of-text token, where the tokenizer itself puts one before a prompt."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _encode_chat(conversation: Conversation, tokenizer: Any) -> Encoded:
    if not tokenizer.is_fast:
        raise ModelError("a chat template needs a fast tokenizer, and this one is not", try_="add its tokenizer.json")
    text, spans = render_chat(conversation, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Encoded(encoded["input_ids"], learned_by_offset(encoded["offset_mapping"], spans))


def render_chat(conversation: Conversation, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation through the chat template, and the characters of each learned turn with its end-of-turn token.

    A turn starts where the rendering of the turns before it ends, with the header that asks for a reply, and ends
    where the rendering up to it ends. Both must be prefixes of the whole, or the spans would be guesses.

    Raises DataError when the template refuses the conversation or rewrites earlier turns once later ones follow.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    text = _rendered(messages, tokenizer, where=conversation.where, reply=False)
    spans = []
    for index, turn in enumerate(conversation.turns):
        if turn.learn:
            before = _rendered(messages[:index], tokenizer, where=conversation.where, reply=True)
            through = _rendered(messages[: index + 1], tokenizer, where=conversation.where, reply=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise _not_a_prefix(conversation.where, index + 1)
            spans.append((len(before), _end_of_turn(text, len(before), len(through), turn.text)))
    return text, spans


def _end_of_turn(text: str, start: int, end: int, content: str) -> int:
    """Where the end-of-turn token ends: white space after it ('<|im_end|>\\n') opens the next turn and isn't learned.

    Where nothing but white space follows the content, that white space is the end of the turn.
    """
    said, own = text[start:end].rstrip(), content.strip()
    unmarked = said.endswith(own) if own else not said
    return end if unmarked else start + len(said)


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


def _rendered(messages: Sequence[dict[str, str]], tokenizer: Any, *, where: str, reply: bool) -> str:
    from jinja2 import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
    except TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses it: {error}") from error
    return rendered


def _not_a_prefix(where: str, turn: int) -> DataError:
    return DataError(
        f"{where}: the tokenizer's chat template writes turn {turn} one way alone and another way in the whole "
        "conversation, so the tokens of the assistant's turns cannot be told apart",
        try_="a chat_template that renders each turn the same whatever follows",
    )


def _prompt_tokens(sample: Encoded) -> int:
    return sample.learn.index(True) if True in sample.learn else len(sample.tokens)


def _nothing_left(records: int, *, seq_len: int, longest_prompt: int) -> DataError:
    if not records:
        return DataError("the data holds no conversation")
    return DataError(
        f"all {records} records were dropped: none has a token to learn within seq_len={seq_len}; "
        f"the longest prompt has {longest_prompt} tokens",
        try_=f"seq_len above {longest_prompt}",
    )
