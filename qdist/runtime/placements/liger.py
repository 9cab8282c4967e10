"""Which of Liger's kernels compute a model, or a stage of one?"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import nn

from qdist.runtime.model.experts import is_experts
from qdist.runtime.model.parts import decoder_of
from qdist.runtime.placements.split.stages import only_present


def take_liger(model: Any) -> None:
    """Have Liger's kernels compute norms and activations of a text model, if Liger knows its type.

    The loss is fused in qdist.runtime.engine.objective, on learned tokens only. A wrapper is patched as the text model
    in it, as Liger would look for the towers. `kernels_of` says what was patched.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    config = model.config.get_text_config(decoder=True)
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if apply is None:
        return
    taken = signature(apply).parameters
    wanted = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    inner = model if config is model.config else decoder_of(model)
    # It raises these for a class that it was not written for; norms that it did not reach are torch's.
    with only_present(model), _own_experts(model), suppress(AttributeError, TypeError):
        apply(model=inner, **{name: value for name, value in wanted.items() if name in taken})
    _mind_strides_of_rotations(model)


def _mind_strides_of_rotations(model: nn.Module) -> None:
    """Have Liger's rotary kernel rotate rows of one token each right, in the files of a model's classes."""
    for source in {type(module).__module__ for module in model.modules()}:
        rotate = getattr(sys.modules.get(source), "apply_rotary_pos_emb", None)
        if rotate is not None and rotate.__module__.startswith("liger_kernel") and not hasattr(rotate, "__wrapped__"):
            vars(sys.modules[source])["apply_rotary_pos_emb"] = by_rows(rotate)


def by_rows(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """A rotary kernel that goes from row to row by a stride of queries and keys [rows, heads, tokens, size].

    Liger's takes that from the dimension of tokens. With one token it means nothing to torch: behind a norm of the
    heads (Gemma 3, Qwen3) it is that of a head, so that rows were rotated over each other, several times, in a race
    (Liger 0.8.5).
    """

    @wraps(rotate)
    def rotated(query: torch.Tensor, key: torch.Tensor, *given: Any, **named: Any) -> Any:
        if query.shape[2] == 1:
            query, key = (each.reshape(len(each), 1, each.shape[1], -1).transpose(1, 2) for each in (query, key))
        return rotate(query, key, *given, **named)

    return rotated


@contextmanager
def _own_experts(model: nn.Module) -> Iterator[None]:
    """Leave experts' forward passes as they are: Liger's read 3-D parameters, which are packed here."""
    parts = [part for path, module in model.named_modules() if is_experts(module) for part in _around(model, path)]
    before = [(part, vars(part).get("forward")) for part in parts]
    yield
    for part, forward in before:
        vars(part).pop("forward", None)
        if forward is not None:
            part.forward = forward


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """A module and the adapters around it."""
    yield model.get_submodule(path)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        yield model.get_submodule(path)
