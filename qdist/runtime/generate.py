"""Answers prompts with a run's adapter or any model: batches, a chat, and before-and-after at the end of a run."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qdist.core import demo
from qdist.core.errors import DataError, QdistError
from qdist.core.plan import Plan
from qdist.core.records import asked
from qdist.host.files import write_atomic
from qdist.runtime.encode import encode
from qdist.runtime.load import ROOM_TOKENS, open_model
from qdist.runtime.quiet import quiet
from qdist.runtime.samples import Samples
from qdist.runtime.tokenized import IGNORED

_TOKEN_BYTES = 3
"""A token is at least this much text, nearly always; so much room is left for prompts before there is a tokenizer."""


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    streamer: Any = None,
    **sampling: Any,
) -> list[list[int]]:
    """The new token ids after each prompt, up to and without the end of the turn; greedy unless told otherwise.

    prompts: token ids; padded on the left, so that every row's next token is at the same place.
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
            **options,
        )
    ends = set(_ends(model, tokenizer))
    answers = []
    for row in out[:, width:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def _ends(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """A conversation up to the assistant's turn: the chat template, or the format the data path trains without one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    return encode(asked(messages, where="the prompt"), tokenizer).tokens


def before_and_after(plan: Plan, model: Any, tokenizer: Any, samples: Samples) -> list[dict[str, str]]:
    """Held-out questions answered without the adapter and with it, beside the answer of the data."""
    if tokenizer is None:
        return []
    questions = _questions(plan, tokenizer, samples)
    training, caching = model.training, model.config.use_cache
    model.eval()
    longest = max(len(tokenizer(expected)["input_ids"]) for _, _, expected in questions)
    prompts = [prompt for _, prompt, _ in questions]

    def answers() -> list[str]:
        return [
            tokenizer.decode(ids).strip()
            for ids in complete(model, tokenizer, prompts, max_new_tokens=min(96, 2 * longest + 8))
        ]

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
        return [(item.order, encode_chat(tokenizer, item.messages()), item.answer) for item in demo.questions()[:count]]
    found: list[tuple[str, list[int], str]] = []
    for index in samples.held_out:
        if len(found) == count:
            break
        span = samples.tokenized.span(index)
        tokens, labels = samples.tokenized.tokens[span].tolist(), samples.tokenized.labels[span].tolist()
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
        expected = tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip()
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


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Conversations to answer: a text file with a prompt a line, or JSONL with `prompt` or `messages`.

    Raises DataError naming file and line.
    """
    if not path.is_file():
        raise DataError(f"no file {path}", try_="a text file with one prompt a line, or JSONL with prompt or messages")
    lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no prompt")
    if path.suffix not in (".jsonl", ".json"):
        return [[{"role": "user", "content": line}] for _, line in lines]
    found = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: {error}", try_="one JSON object a line") from None
        if isinstance(record, dict) and _is_conversation(record.get("messages")):
            found.append(record["messages"])
        elif isinstance(record, dict) and isinstance(record.get("prompt"), str):
            found.append([{"role": "user", "content": record["prompt"]}])
        else:
            raise DataError(
                f"{path}:{number}: neither 'prompt' nor 'messages' with role and content", try_='{"prompt": "..."}'
            )
    return found


def _is_conversation(messages: object) -> bool:
    """A list with at least one message, each with its role and content as text."""
    if not isinstance(messages, list) or not messages:
        return False
    return all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )


def generate_file(
    target: str, prompts: Path, out: Path, *, max_new_tokens: int, batch: int, max_memory_bytes: int | None = None
) -> int:
    """Answer a file of prompts into JSONL; how many there were."""
    conversations = read_prompts(prompts)
    longest = max(sum(len(message["content"].encode()) for message in messages) for messages in conversations)
    tokens = batch * (longest // _TOKEN_BYTES + max_new_tokens)
    model, tokenizer = _opened(target, tokens=tokens, max_memory_bytes=max_memory_bytes)
    encoded = [encode_chat(tokenizer, messages) for messages in conversations]
    # Longest first: the largest batch comes first, where running out of memory loses least.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for index, ids in zip(
            chosen, complete(model, tokenizer, [encoded[i] for i in chosen], max_new_tokens=max_new_tokens), strict=True
        ):
            answers[index] = tokenizer.decode(ids).strip()
        print(f"{min(start + batch, len(order))}/{len(order)} answered", file=sys.stderr, flush=True)
    lines = [
        json.dumps({"messages": conversations[index], "answer": answers[index]}, ensure_ascii=False)
        for index in range(len(encoded))
    ]
    write_atomic(out, "\n".join(lines) + "\n")
    return len(lines)


def _opened(target: str, *, tokens: int, max_memory_bytes: int | None) -> tuple[Any, Any]:
    """Model and tokenizer; says where the model lies."""
    opened = open_model(target, tokens=tokens, max_memory_bytes=max_memory_bytes, needs_tokenizer=True)
    print(opened.where, file=sys.stderr, flush=True)
    return opened.model, opened.tokenizer


def chat(target: str, *, max_new_tokens: int, system: str, max_memory_bytes: int | None = None) -> None:
    """Talk to a model; tokens appear as they come. `/new` starts over, an empty line or end of input leaves."""
    from transformers import TextStreamer

    model, tokenizer = _opened(target, tokens=ROOM_TOKENS, max_memory_bytes=max_memory_bytes)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    print("type a message; /new starts over, an empty line leaves", flush=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            return
        if text == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = complete(
            model, tokenizer, [encode_chat(tokenizer, messages)], max_new_tokens=max_new_tokens, streamer=streamer
        )[0]
        messages.append({"role": "assistant", "content": tokenizer.decode(ids).strip()})


def main() -> None:
    """`python -m qdist.runtime.generate file|chat TARGET ...`, started by the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("file", "chat"))
    parser.add_argument("target")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--system", default="")
    parser.add_argument("--max-memory-bytes", type=int)
    arguments = parser.parse_args()
    quiet()
    try:
        if arguments.what == "chat":
            chat(
                arguments.target,
                max_new_tokens=arguments.max_new_tokens,
                system=arguments.system,
                max_memory_bytes=arguments.max_memory_bytes,
            )
        else:
            count = generate_file(
                arguments.target,
                arguments.prompts,
                arguments.out,
                max_new_tokens=arguments.max_new_tokens,
                batch=arguments.batch,
                max_memory_bytes=arguments.max_memory_bytes,
            )
            print(f"{count} answers in {arguments.out}")
    except QdistError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
