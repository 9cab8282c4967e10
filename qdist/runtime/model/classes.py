"""Which class of transformers computes a model, and the model itself without storage."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qdist.core.model.shapes import Kept

_LARGE = 1 << 26
"""Elements from which a new tensor is made on the meta device while a model is built. Buffers, which must be real, are
smaller; a parameter of experts has some 10^9, and would be made in host memory before it is moved."""
TOWER = "not needed for text"
"""Reason for leaving out a tower of images or sound."""
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)


def class_of(config: Any) -> Any:
    """transformers' auto class that makes a model from a configuration: of text, or of images and text around it.

    Where there are two classes for a configuration of both, it is the one that the published weights are named for.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config.get_text_config() is config:
        return AutoModelForCausalLM
    of_text = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return AutoModelForCausalLM if of_text in (config.architectures or ()) else AutoModelForImageTextToText


def config_of(content: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json's content, in which infinite numbers are spelled as objects."""
    from transformers import AutoConfig

    settings = {key: _number(value) for key, value in content.items() if key != "model_type"}
    return AutoConfig.for_model(str(content["model_type"]), **settings)


def content_of(config: Any) -> dict[str, Any]:
    """The content of a config.json for a configuration of transformers, of what JSON can hold."""
    spelled: dict[str, Any] = _spelled(config.to_dict())
    return spelled


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {key: _spelled(each) for key, each in value.items()}
    return type(value)(map(_spelled, value)) if type(value) in (list, tuple) else value


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        is_number = set(value) == {"__float__"}
        return float(value["__float__"]) if is_number else {key: _number(each) for key, each in value.items()}
    return [_number(each) for each in value] if isinstance(value, list) else value


def empty_model(config: Any, *, dtype: torch.dtype | None = None, whole: bool = False) -> Any:
    """A model whose parameters are on the meta device; its buffers are real.

    config: transformers'. A quantization that it states is taken out of it. dtype: of parameters; None for the default.
    whole: with the towers that training on text leaves out.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    choose_attention(config)
    with init_empty_weights(include_buffers=False), _LargeOnMeta(), no_init_weights():
        given = {} if dtype is None else {"dtype": dtype}
        model = class_of(config).from_config(config, **given, trust_remote_code=False)
    model.tie_weights()
    if not whole:
        leave_out_towers(model)
    return model


def leave_out_towers(model: Any) -> tuple[Kept, ...]:
    """Remove what a wrapper around a text model has besides it: towers of images and sound, and their projectors.

    The text model and the head keep the names that they have in the whole model. Returns what was removed, by path.
    """
    config = model.config
    if config.get_text_config(decoder=True) is config:
        return ()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    removed = []
    for path, parent in _wrappers(model, embedding, type(config.get_text_config(decoder=True))):
        for name, child in list(parent.named_children()):
            inside = set(child.modules())
            if embedding not in inside and head not in inside:
                setattr(parent, name, None)
                removed.append(Kept(f"{path}.{name}".lstrip("."), sum(p.numel() for p in child.parameters()), TOWER))
    return tuple(removed)


def _wrappers(model: Any, embedding: nn.Module, text: type) -> Iterator[tuple[str, Any]]:
    """The modules around the text model, which has a configuration of its own kind."""
    for path, module in list(model.named_modules()):
        is_text = module is embedding or isinstance(getattr(module, "config", None), text)
        if embedding in set(module.modules()) and not is_text:
            yield path, module


def choose_attention(config: Any) -> None:
    """Have transformers write out the scores of attention with a softcap, which torch's fused attention leaves out.

    transformers 5.17 lets Gemma 2 take torch's all the same, and computes another function.
    """
    if read_softcap(config.get_text_config(decoder=True)) is not None:
        config._attn_implementation = "eager"


def read_softcap(config: Any) -> float | None:
    """The cap on the scores of attention; None if there is none. config: of the text model."""
    cap: float | None = getattr(config, "attn_logit_softcapping", None)
    return cap


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _FACTORIES and not given.get("device"):
            sizes = args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args
            count = 1
            for size in sizes:
                count *= size if isinstance(size, int) else 1
            if count >= _LARGE:
                given["device"] = "meta"
        return func(*args, **given)
