"""Answers to held-out questions, without the adapter and with it, at the end of a run."""

from typing import Any

from qdist.core import demo
from qdist.core.plan import Plan
from qdist.core.records import asked
from qdist.runtime.complete import as_written, complete, text_of
from qdist.runtime.samples import Samples
from qdist.runtime.special_tokens import align_config
from qdist.runtime.tokenized import IGNORED
from qdist.runtime.wording import encode_prompt, usual_wording


def before_and_after(plan: Plan, model: Any, tokenizer: Any, samples: Samples) -> list[dict[str, str]]:
    """Held-out questions answered without the adapter and with it, beside the answer of the data."""
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
    """(question, prompt tokens, expected answer): the demo's fixed ones, else the first held-out samples."""
    count = plan.spec.train.answers
    if plan.spec.data == demo.NAME:
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
    """What the user said last: of the pieces between special tokens, the one before the assistant's header."""
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
