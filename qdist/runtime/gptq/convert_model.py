"""Which Llama does a checkpoint belong to, and does it hold all of it?"""

from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import ModelError
from qdist.core.gptq import WORD
from qdist.core.models import config_of
from qdist.host.sources import read_json
from qdist.runtime.gptq.bits import period
from qdist.runtime.gptq.sparsebit import Checkpoint
from qdist.runtime.quantize_source import Blueprint

_KNOWN = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
_BESIDE = (".json", ".jinja", ".model", ".txt")
_OURS = ("config.json", "quantize_config.json", "qdist.json")
_BIASED = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}
"""Key of a Llama's config -> the linears that it gives a bias."""


def model_config(checkpoint: Checkpoint, folder: Path | None, source: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's config.json, and what to say of it."""
    embedding = checkpoint.plain.get("model.embed_tokens.weight")
    dtype = str(embedding.dtype).removeprefix("torch.") if embedding is not None else "float16"
    if folder is None:
        name = _known(checkpoint)
        if name is None:
            shapes = {path: checkpoint.shape(path) for path in ("model.embed_tokens", "model.layers.0.mlp.gate_proj")}
            said = ", ".join(f"{path} {'absent' if size is None else list(size)}" for path, size in shapes.items())
            raise ModelError(
                f"{source} has the shapes of no Llama 7B, 13B, 33B or 65B: {checkpoint.layers} layers, {said}",
                try_="--config FOLDER, with the model's config.json and tokenizer",
            )
        note = f"config: that of {name}, by the shapes; no tokenizer (--config FOLDER brings both)"
        return {**config_of(name), "torch_dtype": dtype}, [note]
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"no file {file}", try_="a folder with the model's config.json and tokenizer")
    config = read_json(file)
    if config.get("model_type") != "llama":
        raise ModelError(f"{file} is of model_type {config.get('model_type')!r}; Sparsebit packs llama")
    config.pop("quantization_config", None)
    if "dtype" not in config:
        config.setdefault("torch_dtype", dtype)
    if "max_sequence_length" in config:  # what alpaca-qlora's own config.json calls it
        config.setdefault("max_position_embeddings", config["max_sequence_length"])
    return config, []


def _known(checkpoint: Checkpoint) -> str | None:
    """The model of the first Llama's sizes that has the checkpoint's shapes."""
    found = (
        checkpoint.shape("model.embed_tokens"),
        checkpoint.shape("model.layers.0.mlp.gate_proj"),
        checkpoint.layers,
    )
    for name in _KNOWN:
        config = config_of(name)
        hidden = config["hidden_size"]
        sizes = ((config["vocab_size"], hidden), (config["intermediate_size"], hidden), config["num_hidden_layers"])
        if found == sizes:
            return name
    return None


def decide_biases(
    checkpoint: Checkpoint, config: dict[str, Any], *, drop: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """The configuration with its bias keys set, the biases that are written, and what to say of the others.

    transformers' Llama has a bias on all linears of attention or of the MLP, or on none of them.
    """
    nonzero = {path for path, value in checkpoint.biases.items() if bool(value.any())}
    kept: dict[str, torch.Tensor] = {}
    keys = {}
    for key, part in _BIASED.items():
        keys[key] = not drop and any(part in path for path in nonzero)
        if keys[key]:
            kept.update({path: value for path, value in checkpoint.biases.items() if part in path})
    stray = sorted(path for path in nonzero if not any(part in path for part in _BIASED.values()))
    if stray and not drop:
        raise ModelError(f"{stray[0]} has a bias, which transformers' Llama has no place for", try_="--drop-bias")
    said = []
    if drop and nonzero:
        said = [f"biases: {len(checkpoint.biases)} left out as asked, {len(nonzero)} of them not zero"]
    elif nonzero:
        said = [f"biases: {len(kept)} kept, {len(nonzero)} of them not zero; config.json asks for them"]
    elif checkpoint.biases:
        said = [f"biases: all {len(checkpoint.biases)} are zero and left out"]
    changed = {key: value for key, value in keys.items() if value or config.get(key)}
    return {**config, **changed}, kept, said


def check(checkpoint: Checkpoint, shape: Blueprint, source: Path) -> None:
    """Compare with what the model's class holds, and with what GPTQ's words can hold."""
    held: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in checkpoint.plain.items()}
    held.update({f"{path}.weight": linear.shape for path, linear in checkpoint.linears.items()})
    held.update({f"{path}.bias": tuple(value.shape) for path, value in checkpoint.biases.items()})
    missing = sorted(name for name in shape.shapes if name not in held and not name.endswith(".bias"))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        total = f"{len(shape.shapes)} tensors"
        raise ModelError(f"{source} lacks {missing[0]}{more} of {total}", try_="the whole checkpoint")
    for name, size in sorted(held.items()):
        if name not in shape.shapes:
            raise ModelError(
                f"{source} holds {name} {list(size)}, which a Llama of {shape.layers} layers has not",
                try_="--config FOLDER of the model that was packed",
            )
        if size != shape.shapes[name]:
            raise ModelError(
                f"{name} has shape {list(size)} in {source}, {list(shape.shapes[name])} in the configuration",
                try_="--config FOLDER of the model that was packed",
            )
    for path, linear in checkpoint.linears.items():
        if f"{path}.weight" not in shape.linears:
            raise ModelError(f"{path} is quantized; GPTQ folders quantize the linears of decoder layers alone")
        count = period(linear.bits)[0]
        if linear.shape[0] % count:
            raise ModelError(
                f"{path} has {linear.shape[0]} outputs; GPTQ packs the zeros of {count} at {linear.bits} bits into "
                f"{count * linear.bits // WORD} words"
            )


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear in a decoder layer."""
    return any(part in name for part in _BIASED.values()) and name.endswith(".weight")


def beside(config: Path | None) -> list[Path]:
    """Tokenizer, chat template and generation settings of a model folder; alpaca-qlora keeps its tokenizer in one of
    its own, `tokenizer`."""
    if config is None:
        return []
    files = {
        path.name: path
        for folder in (config / "tokenizer", config)
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _BESIDE and path.name not in _OURS
        and not path.name.startswith(".") and not path.name.endswith(".index.json")
    }  # fmt: skip
    return list(files.values())
