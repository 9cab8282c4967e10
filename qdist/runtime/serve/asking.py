"""Which questions does a request put to the model, and of how many tokens may the answers be?"""

import secrets
from collections.abc import Mapping
from typing import NamedTuple

from qdist.core.errors import nearest
from qdist.runtime.infer.answerer import Question
from qdist.runtime.infer.prompts import Speech
from qdist.runtime.serve.bodies import MOST_PROMPTS, Body, ChatBody, CompletionBody
from qdist.runtime.serve.reading import sampling_of
from qdist.runtime.serve.refusals import Refusal, unfit
from qdist.runtime.serve.wording import chat_tokens, completion_prompts, prompts_in

_USUAL_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""


class Served(NamedTuple):
    """A model by the name that clients give."""

    name: str
    adapter: str
    """Name by which the answerer knows the adapter; empty for the base."""
    speech: Speech


class Asked(NamedTuple):
    """The questions of a request: `n` for each prompt, one after the other."""

    questions: tuple[Question, ...]
    prompt_tokens: int
    """Tokens of all prompts, each counted once."""


def served(models: Mapping[str, Served], name: str) -> Served:
    """The model that a request names. Raises Refusal, with the names that there are."""
    if name not in models:
        raise Refusal(
            f"there is no model {name[:80]!r} here: there are {', '.join(models)}",
            try_=nearest(name[:80], models) or next(iter(models)),
            status=404,
            field="model",
            code="model_not_found",
        )
    return models[name]


def choices_in(body: Body) -> int:
    """Number of answers that a request asks for. Raises Refusal for too many prompts."""
    prompts = prompts_in(body) if isinstance(body, CompletionBody) else 1
    if prompts > MOST_PROMPTS:
        raise unfit("prompt", [0] * prompts, f"a request has {MOST_PROMPTS} prompts at most")
    return prompts * body.n


def asked_of(body: Body, model: Served, positions: int) -> Asked:
    """The questions of a request. Tokenizing them takes time. Raises Refusal for what cannot be answered."""
    if isinstance(body, ChatBody):
        fields, prompts, usual = ["messages"], [chat_tokens(body, model.speech)], positions
        logprobs = body.top_logprobs if body.logprobs else -1
    else:
        assert isinstance(body, CompletionBody)
        prompts, usual = completion_prompts(body, model.speech), _USUAL_COMPLETION_TOKENS
        fields = [f"prompt[{index}]" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
        logprobs = body.logprobs if isinstance(body.logprobs, int) else -1
    seed = body.seed if isinstance(body.seed, int) else secrets.randbits(62)
    questions = []
    for field, prompt in zip(fields, prompts, strict=True):
        most = _most_new(body, field, len(prompt), positions, usual)
        sampling = sampling_of(body, seed=seed, logprobs=logprobs, most_tokens=most)
        # Answers to one prompt differ by their seeds; the first is what n = 1 gives.
        questions += [Question(prompt, sampling.again(index), model.adapter) for index in range(body.n)]
    return Asked(tuple(questions), sum(map(len, prompts)))


def _most_new(body: Body, field: str, prompt_tokens: int, positions: int, usual: int) -> int:
    """Tokens of an answer, at most. Raises Refusal if the prompt leaves no position for them."""
    left = positions - prompt_tokens
    if left < 1:
        raise Refusal(
            f"{field} has {prompt_tokens:,} tokens, and there are {positions:,} positions for prompt and answer",
            try_="a shorter prompt, or qdist serve with a larger --context",
            field=field,
            code="context_length_exceeded",
        )
    longer = getattr(body, "max_completion_tokens", None)
    name, wanted = ("max_completion_tokens", longer) if isinstance(longer, int) else ("max_tokens", body.max_tokens)
    if not isinstance(wanted, int):
        return min(left, usual)
    if wanted > left:
        raise Refusal(
            f"{name} is {wanted:,}, and {field} has {prompt_tokens:,} of the {positions:,} positions for prompt and "
            "answer",
            try_=f"{name}: {left}",
            field=name,
            code="context_length_exceeded",
        )
    return wanted
