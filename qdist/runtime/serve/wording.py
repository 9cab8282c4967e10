"""Which tokens does a request ask the model to go on from? In the wording that it was trained with."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError
from qdist.host.opening import told
from qdist.runtime.data.encode import opening
from qdist.runtime.data.messages import readable_messages, readable_turns, template_of, tools_of
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
    conversation = _conversation(body)
    if speech.wording.style != "chat":
        return _worded(conversation, speech)
    tools = tools_of(conversation)
    text = _rendered(conversation, tools, speech)
    if tools and text == _rendered(conversation, None, speech):
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


def _rendered(conversation: Conversation, tools: list[dict[str, Any]] | None, speech: Speech) -> str:
    """The conversation through the chat template, which may refuse it. tools: those that it is given.

    Not within the limits of `limits.limited`: those are the process's, and other threads are at work.
    """

    def write(messages: list[dict[str, Any]]) -> str:
        with told("this model's chat template refuses the messages", DataError):
            text: str = speech.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
        return text

    template = template_of(speech.tokenizer, conversation)
    try:
        return write(readable_messages(readable_turns(conversation, template), template, write))
    except DataError as error:
        raise Refusal(error.message, try_="messages in the order that it expects", field="messages") from error


def _worded(conversation: Conversation, speech: Speech) -> list[int]:
    """The tokens of a conversation in the words of a run that was trained without a chat template."""
    if conversation.tools:
        raise unfit("tools", [], "this model was trained without a chat template, which alone writes tools")
    for index, turn in enumerate(conversation.turns):
        if turn.calls or turn.role == "tool":
            raise Refusal(
                f"messages[{index}] is of a tool, and this model was trained without a chat template, which alone "
                "writes tools",
                try_="system, user and assistant",
                field=f"messages[{index}]",
            )
    return _checked(encode_prompt(conversation, speech.tokenizer, speech.wording), "messages", speech)


def _conversation(body: ChatBody) -> Conversation:
    turns = tuple(_turn(each, f"messages[{index}]") for index, each in enumerate(body.messages))
    tools = msgspec.to_builtins(body.tools) if body.tool_choice == "auto" else ()
    return Conversation(turns=turns, where="messages", tools=tuple(tools))


def _turn(message: Message, field: str) -> Turn:
    match message:
        case SystemMessage() | DeveloperMessage():
            return Turn("system", _text(message.content), False)
        case UserMessage():
            return Turn("user", _text(message.content), False)
        case ToolMessage():
            return Turn("tool", _text(message.content), False, tool=message.name, call_id=message.tool_call_id)
    calls = (
        _call(each, f"{field}.tool_calls[{index}].function.arguments") for index, each in enumerate(message.tool_calls)
    )
    return Turn("assistant", _text(_content(message, field)), False, calls=tuple(calls))


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
