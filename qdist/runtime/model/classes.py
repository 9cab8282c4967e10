"""Which class of transformers computes a model, and the model itself without storage."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LARGE = 1 << 26
"""Elements from which a new tensor is made on the meta device while a model is built. Buffers, which must be real, are
smaller; a parameter of experts has some 10^9, and would be made in host memory before it is moved."""
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


def empty_model(config: Any, *, dtype: torch.dtype | None = None) -> Any:
    """A model whose parameters are on the meta device; its buffers are real.

    config: transformers'. A quantization that it states is taken out of it. dtype: of parameters; None for the default.
    """
    from accelerate import init_empty_weights

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        given = {} if dtype is None else {"dtype": dtype}
        model = class_of(config).from_config(config, **given, trust_remote_code=False)
    model.tie_weights()
    return model


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
