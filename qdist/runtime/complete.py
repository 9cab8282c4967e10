"""Continues prompts up to where an answer ends: at a token, or at a text where no token says it."""

from collections.abc import Sequence
from typing import Any

import torch


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    end_text: str = "",
    streamer: Any = None,
    **sampling: Any,
) -> list[list[int]]:
    """The new token ids after each prompt, up to and without the end of the turn; greedy unless told otherwise.

    prompts: token ids; padded on the left, so that every row's next token is at the same place.
    end_text: text before which an answer ends as well.
    """
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
            eos_token_id=_ends(model, tokenizer),
            pad_token_id=pad,
            use_cache=True,
            streamer=streamer,
            stopping_criteria=[_EndText(tokenizer, end_text, width)] if end_text else None,
            **options,
        )
    return [answer_of(model, tokenizer, row, end_text) for row in out[:, width:].tolist()]


def answer_of(model: Any, tokenizer: Any, written: list[int], end_text: str = "") -> list[int]:
    """What was written up to the end of the answer."""
    ends = set(_ends(model, tokenizer))
    stop = next((place for place, token in enumerate(written) if token in ends), len(written))
    return _cut(written[:stop], tokenizer, end_text)


def text_of(tokenizer: Any, answer: list[int]) -> str:
    """An answer as a person reads it."""
    return as_written(tokenizer, answer).strip()


def as_written(tokenizer: Any, tokens: Sequence[int], **options: Any) -> str:
    """Text as it was written: some tokenizers would move the space before a point otherwise."""
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False, **options)
    return text


def _ends(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


class _EndText:
    """Which rows of a batch have written the text at which an answer ends; transformers' stopping criteria are such."""

    def __init__(self, tokenizer: Any, end_text: str, width: int) -> None:
        self._tokenizer, self._end_text, self._width = tokenizer, end_text, width
        # A text may be written in more tokens than the tokenizer would take; none is empty.
        self._tail = len(end_text.encode()) + 1

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = ids[:, max(self._width, ids.shape[1] - self._tail) :].tolist()
        written = [self._end_text in as_written(self._tokenizer, tail) for tail in tails]
        return torch.tensor(written, device=ids.device)


def _cut(answer: list[int], tokenizer: Any, end_text: str) -> list[int]:
    """What comes before the end text."""
    before, found, _ = as_written(tokenizer, answer).partition(end_text) if end_text else ("", "", "")
    if not found:
        return answer
    counts = range(len(answer), -1, -1)
    return answer[: next(count for count in counts if before.startswith(as_written(tokenizer, answer[:count])))]
