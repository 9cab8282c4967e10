"""What was asked, what should have been answered, and what a model did answer."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from qdist.core.data.conversation import Conversation
from qdist.core.errors import DataError


class Message(msgspec.Struct, frozen=True):
    """A turn of a prompt."""

    role: str
    content: str


class Prediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a file of predictions."""

    prompt: tuple[Message, ...]
    prediction: str
    reference: str = ""
    """The answer in the data; empty if there is none."""
    figures: Mapping[str, float] = {}
    """What is measured of this prediction alone, such as rouge1."""
    finish: str = ""
    """Why the answer ended: stop or length; empty if it is not known."""

    @property
    def question(self) -> str:
        """The prompt as one text: what the user said, or the whole dialogue if there is more."""
        if len(self.prompt) == 1:
            return self.prompt[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.prompt)


class Exchange(NamedTuple):
    """A prompt, and the answer that the data has for it."""

    prompt: Conversation
    reference: str


def exchange_of(conversation: Conversation) -> Exchange:
    """A conversation without its last turn, which is the reference.

    Raises DataError for one that does not end with an answer, or in which nothing is asked.
    """
    *asked, last = conversation.turns
    if last.role != "assistant":
        raise DataError(
            f"{conversation.where}: the last turn is the {last.role}'s, so there is no answer to compare with",
            try_="records that end with an answer",
        )
    if not any(turn.role == "user" for turn in asked):
        raise DataError(
            f"{conversation.where}: nothing is asked in it ({conversation.format})",
            try_="perplexity:FILE for text, or records with a prompt and an answer",
        )
    prompt = replace(conversation, turns=tuple(replace(turn, learn=False) for turn in asked))
    return Exchange(prompt, last.text.strip())
