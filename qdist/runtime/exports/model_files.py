"""The files that accompany an exported model's weights: configuration, generation settings and tokenizer."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qdist.core.errors import ModelError
from qdist.core.planning.plan import Plan, Source
from qdist.host.files import write_atomic
from qdist.host.opening import read_object
from qdist.runtime.data.tokenizer import align_config, copy_beside
from qdist.runtime.infer.load import load_tokenizer

_GENERATION = "generation_config.json"


def write_model_files(folder: Path, model: Any, plan: Plan, dtype: torch.dtype) -> None:
    """Write everything but weights and index, without any mention of quantization or adapter.

    model: the backbone, whose weights are not used. plan: the run's.
    """
    source = plan.source
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.use_cache, config.dtype = True, dtype
    if source.vocab_rows is not None:
        config.get_text_config().vocab_size = source.vocab_rows
    generation = SimpleNamespace(**{"eos_token_id": None, **generation_settings(model, source)})
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        align_config(SimpleNamespace(config=config, generation_config=generation), tokenizer, plan.ends)
        tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    for file in sorted(Path(source.own_code).glob("*.py")) if source.own_code else ():
        copy_beside(file, folder)
    write_atomic(folder / _GENERATION, json.dumps(vars(generation), indent=2, sort_keys=True) + "\n")


def write_generation_config(folder: Path, plan: Plan) -> None:
    """Write the tokens that begin, end and pad a run's answers, for users who load only its adapter."""
    tokenizer = load_tokenizer(plan.source)
    if tokenizer is not None:
        said = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        align_config(SimpleNamespace(config=said, generation_config=None), tokenizer, plan.ends)
        write_atomic(folder / _GENERATION, json.dumps(vars(said), indent=2, sort_keys=True) + "\n")


def generation_settings(model: Any, source: Source) -> dict[str, Any]:
    """The source's own settings, unchanged: transformers refuses to save some that it reads."""
    own = Path(source.path) / _GENERATION
    if source.path and own.is_file():
        return read_object(own, ModelError, try_="its published file, or none")
    derived: dict[str, Any] = model.generation_config.to_diff_dict()
    return derived
