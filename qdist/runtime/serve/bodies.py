"""Which fields may the body of a request have, and of which types?"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from qdist.core.sampling import MOST_LOGPROBS

MOST_CHOICES = 16
"""Answers to one prompt, at most."""
MOST_PROMPTS = 256
"""Prompts of one request for completions, at most."""
MOST_TOOLS = 128
MOST_MESSAGES = 4096
"""Messages of one request, at most: chat templates loop over them, some over all for each."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object of which every field is known."""


class TextPart(_Strict, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A part of a message; there are no others than text."""

    text: str


Content = str | Annotated[list[TextPart], Meta(min_length=1)]


class SystemMessage(_Strict, frozen=True, kw_only=True, tag_field="role", tag="system"):
    """What holds for the whole conversation."""

    content: Content


class DeveloperMessage(_Strict, frozen=True, kw_only=True, tag_field="role", tag="developer"):
    """OpenAI's newer name of the system's message."""

    content: Content


class UserMessage(_Strict, frozen=True, kw_only=True, tag_field="role", tag="user"):
    """A question."""

    content: Content


class CalledFunction(_Strict, frozen=True, kw_only=True):
    """A call that an earlier answer made."""

    name: str
    arguments: str
    """A JSON object."""


class ToolCall(_Strict, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """A call of a tool in an earlier answer."""

    id: str = ""
    function: CalledFunction


class AssistantMessage(_Strict, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    """An earlier answer."""

    content: Content | UnsetType = UNSET
    tool_calls: tuple[ToolCall, ...] = ()


class ToolMessage(_Strict, frozen=True, kw_only=True, tag_field="role", tag="tool"):
    """What a tool returned."""

    content: Content
    tool_call_id: str = ""
    name: str = ""


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(_Strict, frozen=True, kw_only=True, omit_defaults=True):
    """A function that an answer may call. What a request leaves out, the chat template is not given either."""

    name: Annotated[str, Meta(min_length=1)]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(_Strict, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """A tool as the chat template is given it."""

    function: Function


class StreamOptions(_Strict, frozen=True, kw_only=True):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class TextFormat(_Strict, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Answers are text."""


class Body(_Strict, frozen=True, kw_only=True):
    """Fields of both endpoints. Numbers that `Sampling` bounds are checked there. Null is as good as absent."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] = 1
    stop: str | list[str] | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return isinstance(self.stream_options, StreamOptions) and self.stream_options.include_usage


class ChatBody(Body, frozen=True, kw_only=True):
    """A request for an answer in a conversation."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] = 0
    tools: Annotated[tuple[Tool, ...], Meta(max_length=MOST_TOOLS)] = ()
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    response_format: TextFormat = TextFormat()


class CompletionBody(Body, frozen=True, kw_only=True):
    """A request to go on with a text, or with several."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | UnsetType = UNSET
    echo: bool = False
