"""How to prompt a model: its tokenizer, and the wording it was trained with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from qdist.core.data.conversation import Conversation, Wording
from qdist.core.data.records import BadRecords, require_whole_characters
from qdist.core.errors import DataError, ModelError
from qdist.host.run.rundir import RunDir
from qdist.host.sources.models import locate, read_json
from qdist.host.sources.targets import step_note
from qdist.runtime.data.tokenizer import repair
from qdist.runtime.data.wording import encode_prompt, usual_wording
from qdist.runtime.infer.load import answering_plan, load_tokenizer
from qdist.runtime.infer.plain import open_tokenizer_of
from qdist.runtime.model.describe import facts_of
from qdist.runtime.quantize.materialize import materialize


class Speech(NamedTuple):
    """How to prompt a model."""

    tokenizer: Any
    wording: Wording
    positions: int | None
    """Maximum tokens of a prompt and its answer together; None if unknown."""
    note: str = ""
    """Which step's adapter answers, if not the last."""


def speech_of(target: str) -> Speech:
    """The tokenizer and wording of a run or of any model. Reads no weights.

    Raises RunError for a run without an adapter, ModelError for a model without a tokenizer.
    """
    run = RunDir(target)
    if run.exists():
        plan = answering_plan(run, needs_tokenizer=True)
        tokenizer = load_tokenizer(plan.source)
        wording = plan.wording or usual_wording(tokenizer)
        return Speech(tokenizer, wording, plan.facts.max_positions, step_note(run))
    folder = materialize(locate(target))
    tokenizer = open_tokenizer_of(folder, target)
    config = read_json(folder / "config.json")
    if "vocab_size" in config:
        repair(tokenizer, config)
    return Speech(tokenizer, usual_wording(tokenizer), _positions(config, target))


def _positions(config: dict[str, Any], name: str) -> int | None:
    try:
        return facts_of(config, name=name).max_positions
    except ModelError:  # a family whose shapes are not known; it can be talked to all the same
        return None


def encode_prompts(prompts: Sequence[Conversation], speech: Speech) -> list[list[int]]:
    """The tokens of each prompt, worded as in training.

    Raises DataError, once for all of them, for prompts that the chat template refuses or that leave no position for an
    answer.
    """
    found, bad = list[list[int]](), BadRecords()
    for prompt in prompts:
        try:
            found.append(_encoded(prompt, speech))
        except DataError as error:
            bad.add(error)
    bad.raise_any(len(prompts), what="prompts")
    return found


def _encoded(prompt: Conversation, speech: Speech) -> list[int]:
    require_whole_characters(prompt)
    tokens = encode_prompt(prompt, speech.tokenizer, speech.wording)
    if speech.positions is not None and len(tokens) >= speech.positions:
        raise DataError(
            f"{prompt.where} has {len(tokens):,} tokens, and the model has {speech.positions:,} positions for prompt "
            "and answer",
            try_="a shorter prompt",
        )
    return tokens
