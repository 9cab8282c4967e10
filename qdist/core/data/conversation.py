"""What a conversation is, and its text when there is no chat template."""

from typing import Any, Literal

import msgspec

from qdist.core.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
Style = Literal["headings", "alpaca", "plain"]
"""Text without a chat template. headings: turns under `### Human:` and `### Assistant:`. alpaca: the prompt of Stanford
Alpaca. plain: one text after the other."""

Way = Literal["chat", "headings", "alpaca", "plain"]
"""A style, or chat for the tokenizer's chat template."""

HUMAN, ASSISTANT = "### Human:", "### Assistant:"
THOUGHT, THOUGHT_END = "<think>", "</think>"
"""Tags that most models think between."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What records and chat templates call the reasoning of an answer: most the first, gpt-oss and Command A the last."""
_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_PAIRED = ", paired with an input that provides further context"
_ALPACA_TAIL = "Write a response that appropriately completes the request.\n\n"
"""The prompt of https://github.com/tatsu-lab/stanford_alpaca, `PROMPT_DICT` in train.py."""


class Turn(msgspec.Struct, frozen=True):
    """What one speaker says; the loss is computed on it when `learn`."""

    role: Role
    text: str
    learn: bool
    extra: str = ""
    """Input of an instruction."""
    thoughts: str = ""
    """Reasoning that comes before the text of an answer."""
    calls: tuple[dict[str, Any], ...] = ()
    """Tools that an answer calls, as OpenAI has them: {"type": "function", "function": {"name": ..., "arguments":
    {...}}}, with the "id" if the record has one."""
    tool: str = ""
    """Name of the tool whose result this is."""
    call_id: str = ""
    """The call that it is the result of."""

    @property
    def said(self) -> str:
        """The whole text, as passed to a chat template."""
        return f"{self.text}\n\n{self.extra}" if self.extra else self.text

    @property
    def is_empty(self) -> bool:
        """Whether an answer says nothing: no text, no thoughts, no call."""
        return not (self.text.strip() or self.thoughts or self.calls)

    @property
    def answered(self) -> str:
        """An answer as plain text, behind its thoughts."""
        if not self.thoughts:
            return self.text
        thought = f"{THOUGHT}\n{self.thoughts.strip()}\n{THOUGHT_END}"
        return f"{thought}\n\n{self.text}" if self.text.strip() else thought


class Segment(msgspec.Struct, frozen=True):
    """A piece of a conversation as plain text; `learn` pieces are followed by the end-of-text token.

    ended: so are these, though nothing is learned of them: they are answers that a prompt quotes.
    """

    text: str
    learn: bool
    ended: bool = False


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """One training sample, or a prompt, before any tokenizer has seen it."""

    turns: tuple[Turn, ...]
    where: str
    """File and line or record it came from, for messages."""
    format: str = "messages"
    """A name of `records.FORMATS`."""
    style: Style = "headings"
    """Style to write it in without a chat template; for raw text, the style it appears to have."""
    gap: str = "\n"
    """Text before a heading."""
    verbatim: bool = False
    """Whether the text is complete as it is: no chat template, even if the tokenizer has one."""
    unused: tuple[str, ...] = ()
    """Keys of the record that were not used."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the record was read, such as that an answer of two was left out."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that may be called, as OpenAI has them: {"type": "function", "function": {"name": ..., "parameters":
    {...}}}."""

    @property
    def has_tools(self) -> bool:
        """Whether it names tools, calls one or holds a result, which chat templates alone can write."""
        return bool(self.tools) or any(turn.calls or turn.role == "tool" for turn in self.turns)

    @property
    def learns(self) -> bool:
        """Whether the loss is computed on any turn."""
        return any(turn.learn for turn in self.turns)

    @property
    def why_nothing(self) -> str:
        """The reason why nothing is learned, for one of which that is true."""
        if any(turn.role == "assistant" and turn.is_empty for turn in self.turns):
            return "the answer is empty"
        disliked = self.format == "preference"
        return "the answer is labelled as a bad one" if disliked else "no turn is marked to be learned"

    def segments(self) -> tuple[Segment, ...]:
        """The text without a chat template, in pieces that are tokenized one by one (as QLoRA does).

        A conversation that ends with a user's turn gives the prompt that asks for the next reply. Raises DataError
        for one with tools: plain text has no words for them.
        """
        if self.has_tools:
            raise DataError(
                f"{self.where} has tools, and only a chat template can write them, which the tokenizer does not have",
                try_="--set data.template=chatml, which writes tools, calls and results",
            )
        return segments(self.turns, "plain" if self.verbatim else self.style, gap=self.gap)


def segments(turns: tuple[Turn, ...], style: Style, *, gap: str = "\n") -> tuple[Segment, ...]:
    """Turns as pieces of plain text.

    gap: what stands before a heading, of the style `headings`.
    """
    write = {"headings": _under_heading, "alpaca": _as_alpaca, "plain": _as_is}[style]
    return tuple(
        Segment(write(turn, turns[:index], gap), turn.learn, ended=turn.role == "assistant" and not turn.learn)
        for index, turn in enumerate(turns)
    )


def _under_heading(turn: Turn, before: tuple[Turn, ...], gap: str) -> str:
    if turn.role == "assistant":
        return f" {turn.answered}"
    if turn.role == "system":
        return f"{turn.text}\n"
    return f"{gap if before else ''}{HUMAN} {turn.said}{gap}{ASSISTANT}"


def _as_alpaca(turn: Turn, before: tuple[Turn, ...], gap: str) -> str:
    if turn.role == "assistant":
        return turn.answered
    if turn.role == "system":
        return f"{turn.text}\n\n"
    paired = _ALPACA_PAIRED if turn.extra else ""
    again = any(earlier.role == "user" for earlier in before)
    head = "\n\n" if again else f"{_ALPACA_HEAD}{paired}. {_ALPACA_TAIL}"
    given = f"\n\n### Input:\n{turn.extra}" if turn.extra else ""
    return f"{head}### Instruction:\n{turn.text}{given}\n\n### Response:"


def _as_is(turn: Turn, before: tuple[Turn, ...], gap: str) -> str:
    if turn.role == "assistant":
        return turn.answered
    return f"{turn.text}\n\n" if turn.role == "system" else turn.said


class Wording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the conversations of a run became text, and how answers end: prompts are written the same way."""

    format: str = ""
    """Format of the records: a name of `records.FORMATS`, or several separated by commas; empty if there were none."""
    style: Way
    gap: str = "\n"
    raw: bool = False
    """Whether the records held the whole text, prompts included."""
    lead: str = ""
    """Text that the chat template puts between an answer's header and the answer: context, never learned."""
    ends: tuple[int, ...] = ()
    """Tokens that end an answer."""
    end_text: str = ""
    """Text that ends an answer, if that is not a single token."""

    def __str__(self) -> str:
        """'oasst, raw text'."""
        ways = {
            "chat": "chat template",
            "headings": f"turns under {HUMAN} and {ASSISTANT}",
            "alpaca": "Alpaca's prompt",
            "plain": "prompts as they are",
        }
        way = "raw text" if self.raw else ways[self.style]
        return f"{self.format}, {way}" if self.format else way


def template_of(style: Style, gap: str, *, opening: bool) -> str:
    """A chat template that writes what `segments` does, so that other programs prompt a model as it was trained.

    opening: begin with the begin-of-text token. Alpaca's prompt has the input of an instruction apart, where a message
    has it under `input` beside its `instruction`.
    """
    first, ended = "{{ bos_token }}" if opening else "", "{{ eos_token }}"
    text = "{{ m.content }}"
    system = {"headings": text + written("\n"), "alpaca": text + written("\n\n"), "plain": text + written("\n\n")}
    answer = {"headings": f"{written(' ')}{text}", "alpaca": text, "plain": text}[style] + ended
    asked = {
        "headings": f"{{% if not loop.first %}}{written(gap)}{{% endif %}}"
        + written(f"{HUMAN} ")
        + text
        + written(f"{gap}{ASSISTANT}"),
        "alpaca": f"{{% if seen.user %}}{written(chr(10) * 2)}{{% else %}}"
        + written(_ALPACA_HEAD)
        + f"{{% if m.input %}}{written(_ALPACA_PAIRED)}{{% endif %}}"
        + written(f". {_ALPACA_TAIL}")
        + "{% endif %}"
        + written("### Instruction:\n")
        + "{{ m.instruction if m.input else m.content }}{% if m.input %}"
        + written("\n\n### Input:\n")
        + "{{ m.input }}{% endif %}"
        + written("\n\n### Response:"),
        "plain": text,
    }[style]
    body = (
        f"{{% if m.role == 'assistant' %}}{answer}{{% elif m.role == 'system' %}}{system[style]}"
        f"{{% else %}}{asked}{{% set seen.user = true %}}{{% endif %}}"
    )
    return f"{first}{{% set seen = namespace(user=false) %}}{{% for m in messages %}}{body}{{% endfor %}}"


def written(text: str) -> str:
    """Text as an expression: Jinja's trimming of white space around blocks must not reach it."""
    return "{{ " + msgspec.json.encode(text).decode() + " }}" if text else ""
