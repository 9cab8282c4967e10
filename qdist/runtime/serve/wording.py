"""Which tokens does a request ask the model to go on from? In the wording that it was trained with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, structs

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError
from qdist.host.opening import told
from qdist.runtime.data.encode import opening
from qdist.runtime.data.wording import encode_prompt
from qdist.runtime.infer.prompts import Speech
from qdist.runtime.serve.bodies import (
    AssistantMessage,
    ChatBody,
    CompletionBody,
    Content,
    DeveloperMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)  # fmt: skip
from qdist.runtime.serve.refusals import Refusal, unfit


def chat_tokens(body: ChatBody, speech: Speech) -> list[int]:
    """The tokens of a conversation, up to where the answer begins. Raises Refusal for one that cannot be worded."""
    if speech.wording.style != "chat":
        return _worded(body, speech)
    tools = [structs.asdict(tool) | {"type": "function"} for tool in body.tools] if body.tool_choice == "auto" else []
    messages = [_as_template_reads(each, f"messages[{index}]") for index, each in enumerate(body.messages)]
    text = _rendered(messages, tools, speech)
    if tools and text == _rendered(messages, [], speech):
        raise unfit("tools", tools, "this model's chat template writes none", try_="another model, or no tools")
    ids: list[int] = speech.tokenizer(text + speech.wording.lead, add_special_tokens=False)["input_ids"]
    return _checked(ids, "messages", speech)


def completion_prompts(body: CompletionBody, speech: Speech) -> list[list[int]]:
    """The tokens of each prompt of a request for completions. Raises Refusal."""
    given = body.prompt
    if isinstance(given, str):
        return [_of_text(given, "prompt", speech)]
    kinds = {type(each) for each in given}
    if len(kinds) > 1:
        raise unfit("prompt", given, "it is a text, token ids, or a list of either, not of several kinds")
    if kinds == {int}:
        return [_of_ids(given, "prompt", speech)]
    tokens: dict[type, Callable[[Any, str, Speech], list[int]]] = {str: _of_text, list: _of_ids}
    return [tokens[type(each)](each, f"prompt[{index}]", speech) for index, each in enumerate(given)]


def prompts_in(body: CompletionBody) -> int:
    """Number of prompts of a request for completions."""
    return 1 if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else len(body.prompt)


def _of_text(text: str, field: str, speech: Speech) -> list[int]:
    ids: list[int] = speech.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = opening(speech.tokenizer)
    return _checked(ids if ids[: len(first)] == first else first + ids, field, speech)


def _of_ids(ids: Sequence[Any], field: str, speech: Speech) -> list[int]:
    most = len(speech.tokenizer)
    if wrong := [token for token in ids if not isinstance(token, int) or not 0 <= token < most]:
        raise unfit(field, wrong[0], f"the vocabulary has the tokens 0 to {most - 1:,}")
    return _checked(list(ids), field, speech)


def _checked(ids: list[int], field: str, speech: Speech) -> list[int]:
    if not ids:
        raise Refusal(f"{field} has no token to go on from", try_="a text", field=field)
    return ids


def _rendered(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], speech: Speech) -> str:
    """The conversation through the chat template, which may refuse it.

    Not within the limits of `limits.limited`: those are the process's, and other threads are at work.
    """
    apply, given = speech.tokenizer.apply_chat_template, [dict(tool) for tool in tools] or None
    try:
        with told("this model's chat template refuses the messages", DataError):
            text: str = apply(messages, tools=given, tokenize=False, add_generation_prompt=True)
    except DataError as error:
        raise Refusal(error.message, try_="messages in the order that it expects", field="messages") from error
    return text


def _worded(body: ChatBody, speech: Speech) -> list[int]:
    """The conversation in the words of a run that was trained without a chat template."""
    if body.tools and body.tool_choice == "auto":
        raise unfit("tools", [], "this model was trained without a chat template, which alone writes tools")
    turns = tuple(_turn(each, f"messages[{index}]") for index, each in enumerate(body.messages))
    ids = encode_prompt(Conversation(turns=turns, where="messages"), speech.tokenizer, speech.wording)
    return _checked(ids, "messages", speech)


def _turn(message: Message, field: str) -> Turn:
    match message:
        case SystemMessage() | DeveloperMessage():
            return Turn("system", _text(message.content), False)
        case UserMessage():
            return Turn("user", _text(message.content), False)
        case AssistantMessage(tool_calls=()):
            return Turn("assistant", _text(_content(message, field)), False)
    raise Refusal(
        f"{field} is of a tool, and this model was trained without a chat template, which alone writes tools",
        try_="system, user and assistant",
        field=field,
    )


def _as_template_reads(message: Message, field: str) -> dict[str, Any]:
    """A message as chat templates of the hub expect it: text, and arguments of calls as objects."""
    match message:
        case SystemMessage() | DeveloperMessage():
            return {"role": "system", "content": _text(message.content)}
        case UserMessage():
            return {"role": "user", "content": _text(message.content)}
        case ToolMessage():
            about = {"tool_call_id": message.tool_call_id, "name": message.name}
            return {"role": "tool", "content": _text(message.content)} | {k: v for k, v in about.items() if v}
    calls = [
        _call(each, f"{field}.tool_calls[{index}].function.arguments") for index, each in enumerate(message.tool_calls)
    ]
    return {"role": "assistant", "content": _text(_content(message, field))} | ({"tool_calls": calls} if calls else {})


def _call(call: ToolCall, field: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise unfit(field, call.function.arguments, "it is a JSON object, as text") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content(message: AssistantMessage, field: str) -> Content:
    if message.content is UNSET and not message.tool_calls:
        raise Refusal(f"{field}.content is missing", field=f"{field}.content")
    return "" if isinstance(message.content, msgspec.UnsetType) else message.content


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
