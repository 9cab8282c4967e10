"""Continues prompts to the end of an answer; and answers a run's questions before and after training."""

from collections.abc import Sequence
from typing import Any

import torch

from qdist.core.data import demo
from qdist.core.data.records import asked
from qdist.core.planning.plan import Plan
from qdist.runtime.data.batches import Samples
from qdist.runtime.data.tokenized import IGNORED
from qdist.runtime.data.tokenizer import align_config
from qdist.runtime.data.wording import encode_prompt, usual_wording


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    end_text: str = "",
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[list[int]]:
    """The new token ids after each prompt, excluding the end of the turn; greedy unless told otherwise.

    prompts: token ids; padded on the left, so that every row's next token is at the same place.
    end_text: text before which an answer ends as well. stop: more of them.
    """
    texts = tuple(filter(None, (end_text, *stop)))
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    options = {"do_sample": False, **sampling}
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends_of(model, tokenizer),
            pad_token_id=pad,
            use_cache=True,
            stopping_criteria=[_EndText(tokenizer, texts, width)] if texts else None,
            **options,
        )
    return [answer_of(model, tokenizer, row, texts) for row in out[:, width:].tolist()]


def answer_of(model: Any, tokenizer: Any, written: list[int], texts: Sequence[str]) -> list[int]:
    """The generated tokens up to the end of the answer: a token that ends it, or one of some texts."""
    ends = set(ends_of(model, tokenizer))
    stop = next((place for place, token in enumerate(written) if token in ends), len(written))
    answer = written[:stop]
    return min((_cut(answer, tokenizer, text) for text in texts), key=len, default=answer)


def text_of(tokenizer: Any, answer: list[int]) -> str:
    """An answer as text for people."""
    return as_written(tokenizer, answer).strip()


def as_written(tokenizer: Any, tokens: Sequence[int], **options: Any) -> str:
    """Text exactly as generated: some tokenizers would otherwise move the space before punctuation."""
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False, **options)
    return text


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, of the model's settings and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


class _EndText:
    """Which rows of a batch have produced a text that ends an answer, as a transformers stopping criterion."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int) -> None:
        self._tokenizer, self._texts, self._width = tokenizer, texts, width
        # A text may be written in more tokens than the tokenizer would take; none is empty.
        self._tail = max(len(text.encode()) for text in texts) + 1

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = ids[:, max(self._width, ids.shape[1] - self._tail) :].tolist()
        written = [as_written(self._tokenizer, tail) for tail in tails]
        ended = [any(text in own for text in self._texts) for own in written]
        return torch.tensor(ended, device=ids.device)


def _cut(answer: list[int], tokenizer: Any, end_text: str) -> list[int]:
    """The part of an answer before the end text."""
    before, found, _ = as_written(tokenizer, answer).partition(end_text)
    if not found:
        return answer
    counts = range(len(answer), -1, -1)
    return answer[: next(count for count in counts if before.startswith(as_written(tokenizer, answer[:count])))]


def before_and_after(plan: Plan, model: Any, tokenizer: Any, samples: Samples) -> list[dict[str, str]]:
    """Held-out questions answered without and with the adapter, next to the answer in the data."""
    if tokenizer is None:
        return []
    questions = _questions(plan, tokenizer, samples)
    training, caching = model.training, model.config.use_cache
    model.eval()
    align_config(model, tokenizer, plan.ends)
    longest = max(len(tokenizer(expected)["input_ids"]) for _, _, expected in questions)
    prompts = [prompt for _, prompt, _ in questions]
    end_text = plan.wording.end_text if plan.wording else ""

    def answers() -> list[str]:
        most = min(96, 2 * longest + 8)
        found = complete(model, tokenizer, prompts, max_new_tokens=most, end_text=end_text)
        return [text_of(tokenizer, answer) for answer in found]

    after = answers()
    with model.disable_adapter():
        before = answers()
    model.train(training)
    model.config.use_cache = caching
    return [
        {"question": question, "before": old, "after": new, "expected": expected}
        for (question, _, expected), old, new in zip(questions, before, after, strict=True)
    ]


def _questions(plan: Plan, tokenizer: Any, samples: Samples) -> list[tuple[str, list[int], str]]:
    """(question, prompt tokens, expected answer): the demo's fixed questions, else the first held-out samples."""
    count = plan.spec.train.answers
    if plan.spec.data.path == demo.NAME:
        wording = plan.wording or usual_wording(tokenizer)
        return [
            (
                item.order,
                encode_prompt(asked({"messages": item.messages()}, where="demo"), tokenizer, wording),
                item.answer,
            )
            for item in demo.questions()[:count]
        ]
    found: list[tuple[str, list[int], str]] = []
    for index in samples.held_out:
        if len(found) == count:
            break
        span = samples.tokenized.span(index)
        tokens, labels = samples.tokenized.tokens[span].tolist(), samples.tokenized.labels[span].tolist()
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
        expected = as_written(tokenizer, tokens[start:end], skip_special_tokens=True).strip()
        if expected not in {known for _, _, known in found}:
            found.append((_last_turn(tokens[:start], tokenizer), tokens[:start], expected))
    return found


def _last_turn(prompt: list[int], tokenizer: Any) -> str:
    """The user's last turn: of the pieces between special tokens, the one before the assistant's header."""
    special = set(tokenizer.all_special_ids)
    pieces: list[list[int]] = [[]]
    for token in prompt:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    texts = [text for text in (tokenizer.decode(piece).strip() for piece in pieces) if text]
    said = texts[-2] if len(texts) > 1 else texts[-1] if texts else ""
    return said.removeprefix("user\n").strip()
