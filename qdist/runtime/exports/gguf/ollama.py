"""Writes the Modelfile beside a run's GGUF file: Ollama then prompts the model as it was trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.modelfile import Messages, go_template, modelfile
from qdist.core.errors import DataError
from qdist.core.planning.plan import Plan
from qdist.core.text import quoted
from qdist.host.sources.models import read_json
from qdist.runtime.data.chat_template import prompt_text
from qdist.runtime.data.encode import opening
from qdist.runtime.data.wording import keep_wording, usual_wording
from qdist.runtime.infer.load import load_tokenizer

_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
               "repetition_penalty": "repeat_penalty"}  # fmt: skip
"""Ollama's names of what generation_config.json says."""


def worded_tokenizer(plan: Plan) -> Any:
    """The run's tokenizer with the chat template that it was trained with; None for random weights."""
    tokenizer = load_tokenizer(plan.source)
    if tokenizer is not None:
        keep_wording(tokenizer, plan.wording or usual_wording(tokenizer))
    return tokenizer


def write_modelfile(file: Path, plan: Plan, tokenizer: Any) -> str:
    """Write the Modelfile of a GGUF file; returns what to say about it.

    tokenizer: of `worded_tokenizer`. What is there already is left as it is.
    """
    out = next((place for place in _places(file) if not place.exists()), None)
    if out is None:
        return f"{file.with_name('Modelfile')} is there already: no other was written"
    template = None
    if tokenizer.chat_template:
        lead = plan.wording.lead if plan.wording else ""
        template = go_template(_writer(tokenizer, lead), opening=tokenizer.bos_token if opening(tokenizer) else "")
    text = modelfile(file.name, template, system="", stops=tuple(_stops(plan, tokenizer)), parameters=_parameters(plan))
    with open(out, "x", encoding="utf-8") as beside:
        beside.write(text)
    return f"for Ollama: {quoted('ollama', 'create', file.stem.lower(), '-f', out)}"


def _places(file: Path) -> tuple[Path, ...]:
    return file.with_name("Modelfile"), file.with_name(f"{file.stem}.Modelfile")


def _writer(tokenizer: Any, lead: str) -> Any:
    """The chat template as `go_template` asks for it."""

    def write(messages: Messages) -> str:
        turns = tuple(Turn(role, text, False) for role, text in messages)
        try:
            return prompt_text(Conversation(turns=turns, where="the chat template"), tokenizer) + lead
        except DataError as error:
            raise ValueError(str(error)) from error

    return write


def _stops(plan: Plan, tokenizer: Any) -> Iterator[str]:
    """Texts that end answers: Ollama knows of the file's own end of text alone."""
    ends = (plan.wording.ends if plan.wording else ()) or (tokenizer.eos_token_id,)
    yield from tokenizer.convert_ids_to_tokens([end for end in ends if end is not None])
    if plan.wording and plan.wording.end_text:
        yield plan.wording.end_text


def _parameters(plan: Plan) -> dict[str, float]:
    """How the model's publisher has it draw, where that is said."""
    file = Path(plan.source.path) / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    if not said.get("do_sample"):
        return {}
    return {own: float(said[name]) for name, own in _PARAMETERS.items() if isinstance(said.get(name), int | float)}
