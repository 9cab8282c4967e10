"""Reads the body of a request, and says of what is wrong in it which field, which value, and what would do."""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec

from qdist.core.sampling import Sampling
from qdist.runtime.serve.bodies import Body, ChatBody, CompletionBody
from qdist.runtime.serve.refusals import Refusal, shown, unfit

Of = TypeVar("Of", bound=msgspec.Struct)
_WORDS = {
    "str": "text", "int": "an integer", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip
_ONLY = {
    "role": "it is system, developer, user, assistant or tool",
    "content.type": "it is text: images, sound and files are not read",
    "tools.type": "it is function",
    "tool_calls.type": "it is function",
    "response_format.type": "it is text: answers are not bound to a grammar",
    "tool_choice": "it is none or auto: a call cannot be forced",
    "service_tier": "it is auto or default: there is one tier",
}
"""What would do where msgspec names no type, by the end of the field's path without indices."""
_INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
    "max_new_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "best_of": "n",
    "logit_bias": "leave it out",
    "suffix": "leave it out",
}
"""What to use in place of fields that are not supported."""


def read_chat(raw: bytes) -> ChatBody:
    """The body of `/v1/chat/completions`. Raises Refusal."""
    body = _converted(_without_nulls(_decoded(raw)), ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise unfit("top_logprobs", body.top_logprobs, "logprobs is false", try_="logprobs: true")
    if isinstance(body.max_tokens, int) and isinstance(body.max_completion_tokens, int):
        raise unfit(
            "max_completion_tokens", body.max_completion_tokens, "max_tokens says it as well", try_="one of them"
        )
    _check(body)
    return body


def read_completion(raw: bytes) -> CompletionBody:
    """The body of `/v1/completions`. Raises Refusal."""
    body = _converted(_without_nulls(_decoded(raw)), CompletionBody)
    if body.echo and isinstance(body.logprobs, int):
        raise unfit(
            "echo", True, "log-probabilities of a prompt's tokens are not computed", try_="echo without logprobs"
        )
    _check(body)
    return body


def sampling_of(body: Body, *, seed: int, logprobs: int, most_tokens: int) -> Sampling:
    """How a body wants its answers sampled. Raises Refusal for a number out of its bounds.

    logprobs: as `Sampling` counts them. most_tokens: `max_new_tokens`.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stop:
        raise unfit("stop", "", "an empty text stands everywhere", try_="leave it out")
    named = (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    given = {name: getattr(body, name) for name in named}
    given |= {"seed": seed, "stop": stop, "logprobs": logprobs, "max_new_tokens": most_tokens}
    return _converted(given, Sampling)


def _check(body: Body) -> None:
    """What types do not say."""
    if body.store:
        raise unfit("store", True, "nothing is kept here", try_="store: false")
    if body.stream_options and not body.stream:
        raise Refusal("stream_options goes with stream: true", try_="leave it out", field="stream_options")


def _decoded(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body."""
    try:
        found = msgspec.json.decode(raw)
    except RecursionError:
        raise Refusal("the body is nested too deeply", try_="a flatter one") from None
    except msgspec.ValidationError:
        raise Refusal("the body has a number that no program can hold", try_="a smaller one") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = "the body is empty" if not raw.strip() else f"the body is not JSON: {_lowered(str(error))}"
        raise Refusal(why, try_='a JSON object such as {"model": ..., "messages": [...]}') from None
    if not isinstance(found, dict):
        raise Refusal(f"the body is {shown(found)}", try_="a JSON object")
    return found


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """A body without the null fields that clients send for what they leave open; schemas of tools keep theirs."""
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [_filled(each, _message_field) for each in messages]
    return _filled(body)


def _message_field(value: Any) -> Any:
    return [_filled(each) for each in value] if isinstance(value, list) else value


def _filled(value: Any, inner: Callable[[Any], Any] = lambda value: value) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: inner(each) for name, each in value.items() if each is not None}


def _converted(given: Mapping[str, Any], kind: type[Of]) -> Of:
    """A struct of decoded JSON. Raises Refusal naming the field."""
    try:
        return msgspec.convert(given, kind)
    except RecursionError:
        raise Refusal("the body is nested too deeply", try_="a flatter one") from None
    except msgspec.ValidationError as error:
        raise _refusal(str(error), given, kind) from None


def _refusal(message: str, given: Mapping[str, Any], kind: type[msgspec.Struct]) -> Refusal:
    """msgspec's 'Expected `float`, got `str` - at `$.top_p`' with the value that was given and what would do."""
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if found := re.fullmatch(r"Object missing required field `(.*)`", reason):
        field = f"{path}.{found[1]}" if path else found[1]
        return Refusal(f"{field} is missing", field=field)
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
        return _unsupported(found[1], path, kind)
    if path == "[...]" or path.endswith("[...]"):
        return Refusal(f"{path}: {_lowered(reason)}", try_="another value")
    return unfit(path, _at(given, path), _wanted(reason, path))


def _unsupported(name: str, path: str, kind: type[msgspec.Struct]) -> Refusal:
    field = f"{path}.{name}" if path else name
    known = () if path else [each.encode_name for each in msgspec.structs.fields(kind)]
    near = _INSTEAD.get(name) or next(iter(get_close_matches(name, known, 1, 0.75)), "")
    return Refusal(f"{shown(field)} is not supported by this server", try_=near or "leave it out", field=field)


def _at(given: Any, path: str) -> Any:
    """The value at a path such as `messages[0].content`; keys of maps that msgspec leaves out end the search."""
    for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path):
        try:
            given = given[int(index) if index else name]
        except (KeyError, IndexError, TypeError):
            break
    return given


def _wanted(reason: str, path: str) -> str:
    """What would do in place of a value."""
    plain = re.sub(r"\[\d+\]", "", path)
    for end, words in _ONLY.items():
        if plain == end or plain.endswith(f".{end}"):
            return words
    found = re.match(r"Expected `([^`]*)`(?: (of length )?([<>]=? .*?))?(?:, got .*)?$", reason)
    if found is None:
        return _lowered(reason)
    kinds = " or ".join(_WORDS.get(kind, kind) for kind in found[1].split(" | "))
    bound = f" {found[2] or ''}{found[3]}" if found[3] else ""
    return f"it is {kinds}{bound}"


def _lowered(text: str) -> str:
    """A sentence of msgspec's within one of ours."""
    return text[:1].lower() + text[1:] if text[:2] != "JS" else text
