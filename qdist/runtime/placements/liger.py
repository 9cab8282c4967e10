"""Which of Liger's kernels compute a model, or a stage of one?"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

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
