"""Tiny models as GGUF files, and what a reader should find in them."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch

from qdist.runtime.exports.gguf.file import Affine, Kind, Report, write_gguf
from tests.runtime.tiny import logits_of, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS: tuple[Kind, ...] = ("f16", "q8_0", "q4_1")
EXACT = 1e-5
"""What float32 adds to logits, relative to the largest: the file's norms have an epsilon of float32, for one."""
ERRORS = {"f16": 2.0**-11 + 1e-5, "q8_0": 1 / 254 + 2.0**-11 + 1e-3, "q4_1": 1e-3}
"""Of a weight, relative to the largest of its tensor."""
QWEN3: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""transformers' GGUF reader gives every Qwen3 heads of 128, whatever the file says."""


def model_of(family: str, **changes: Any) -> Any:
    """A tiny model whose biases and norms are not what they are initialized to."""
    model = tiny_model(family, **{**(QWEN3 if family == "qwen3" else {}), **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tensors_of(model: Any, kind: Kind = "f16", *, group_size: int = 32) -> dict[str, Any]:
    """A model's tensors; for q4_1 its linears become random affine ones, which the model takes over."""
    state = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
    tensors: dict[str, Any] = {name: (tuple(value.shape), value.clone) for name, value in state.items()}
    if kind == "q4_1":
        for seed, name in enumerate(name for name in state if name.endswith("_proj.weight")):
            affine = random_affine(tuple(state[name].shape), group_size=group_size, seed=seed)
            tensors[name] = tuple(state[name].shape), partial(affine._replace)
            state[name].copy_(weights_of(affine))
    return tensors


def random_affine(shape: tuple[int, ...], *, group_size: int = 32, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[1] // group_size)
    values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, shape[0], generator=generator) * 0.05 + 0.005).half()
    zeros = torch.rand(groups, shape[0], generator=generator) * 15
    return Affine(values, scales, -scales.float() * zeros, group_size)


def weights_of(affine: Affine) -> torch.Tensor:
    """What Q4_1 stands for, weight by weight: minimums in fp16."""
    group = torch.arange(affine.values.shape[1]) // affine.group_size
    minimums = affine.minimums.half().float().t()[:, group]
    return affine.values.float() * affine.scales.half().float().t()[:, group] + minimums


def rounded(model: Any, kind: Kind) -> Any:
    """The model with its matrices rounded as the kind rounds them, written down anew. Affine linears are exact."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if weight.dim() == 2 and kind == "q8_0" and weight.shape[1] % 32 == 0:
                blocks = weight.reshape(-1, 32)
                steps = blocks.abs().amax(1, keepdim=True) / 127
                levels = (blocks * (1 / steps)).abs().add(0.5).floor() * blocks.sign()
                weight.copy_((levels * steps.half().float()).reshape(weight.shape))
            elif weight.dim() == 2 and not (kind == "q4_1" and name.endswith("_proj.weight")):
                weight.copy_(weight.half())
    return twin


def config_of(model: Any) -> dict[str, Any]:
    settings: dict[str, Any] = model.config.to_dict()
    return settings


def written(folder: Path, model: Any, kind: Kind = "f16", **more: Any) -> tuple[Path, dict[str, Any], Report]:
    tensors = more.pop("tensors", None) or tensors_of(model, kind)
    config = more.pop("config", None) or config_of(model)
    out = folder / "model.gguf"
    report = write_gguf(out, tensors, config=config, tokenizer=None, name="tiny", kind=kind, **more)
    return out, tensors, report


def read_back(out: Path, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    more = {"config": config} if config is not None else {}
    return AutoModelForCausalLM.from_pretrained(str(out.parent), gguf_file=out.name, dtype=torch.float32, **more).eval()


def difference(model: Any, other: Any) -> float:
    """The largest difference of logits, relative to the largest logit."""
    expected, found = logits_of(model), logits_of(other)
    return float((found - expected).abs().max() / expected.abs().max())


def fields(out: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}
