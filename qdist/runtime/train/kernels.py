"""Which kernels compute a loaded model: attention, loss, norms and recurrence?"""

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from qdist.core.telemetry.kernels import Kernels
from qdist.core.text import counted
from qdist.runtime.engine.head import head_rule
from qdist.runtime.model.apart import keeps_samples_apart
from qdist.runtime.model.causal import NAME
from qdist.runtime.model.packed import PackedLinear
from qdist.runtime.model.parts import decoder_layers, head_of

_LIGER = "liger_kernel"
_OF_A_STEP = ("update", "recurrent")


def kernels_of(model: Any, *, fused: bool, experts: str = "", graphs: bool = False) -> Kernels:
    """The kernels of a model, or of a stage of one, that was prepared for training.

    fused: whether the loss is to be fused with the head. experts: how their products are computed, in words. graphs:
    whether passes are captured.
    """
    return Kernels(
        attention=_attention(model),
        loss=_loss(model, fused=fused) if next(head_of(model).parameters(), None) is not None else "",
        norms=_norms(model),
        recurrence=_recurrence(model),
        experts=experts,
        passes="replayed as CUDA graphs" if graphs else "",
        products=_products(model),
    )


def _products(model: Any) -> str:
    """'in fp8', with how many of the linears where some have a shape that torch does not multiply."""
    linears = [module for module in decoder_layers(model).modules() if isinstance(module, PackedLinear)]
    set_apart = [linear for linear in linears if linear.compute]
    if not set_apart:
        return ""
    some = f" ({len(set_apart)} of {counted(len(linears), 'linear')})" if len(set_apart) < len(linears) else ""
    return f"in {set_apart[0].compute}{some}"


def _attention(model: Any) -> str:
    if not any("Attention" in type(module).__name__ for module in decoder_layers(model).modules()):
        return ""
    if keeps_samples_apart(model):
        return "of each sample by itself"
    name = str(model.config.get_text_config(decoder=True)._attn_implementation or "eager")
    return "sdpa" if name == NAME else name


def _loss(model: Any, *, fused: bool) -> str:
    if not head_rule(model).plain:
        return "of the class's own logits"
    return "fused" if fused else "of torch"


def _norms(model: Any) -> str:
    norms = [module for module in decoder_layers(model).modules() if "Norm" in type(module).__name__]
    patched = [module for module in norms if _is_liger(vars(module).get("forward"))]
    if not norms:
        return ""
    if not patched:
        return "of torch"
    return "of Liger" if len(patched) == len(norms) else f"of Liger ({len(patched)} of {len(norms)})"


def _is_liger(forward: Any) -> bool:
    return str(getattr(forward, "__module__", "")).startswith(_LIGER)


def _recurrence(model: Any) -> str:
    """What transformers took for each function for which it looks for a package (`hub_kernels.py`)."""
    taken = {}
    for module in _modeling_modules(model):
        used = _used_names(model, module)
        for name, function in vars(module).items():
            if name in used and callable(function) and (choice := _choice(function)):
                taken[choice[0]] = choice
    return " and ".join(
        f"{name} of {package}" if fast else f"{name} of torch (slow, without {package})"
        for name, package, fast in taken.values()
    )


def _modeling_modules(model: Any) -> Iterator[ModuleType]:
    names = dict.fromkeys(type(layer).__module__ for layer in decoder_layers(model))
    return (sys.modules[name] for name in names if name in sys.modules)


def _used_names(model: Any, module: ModuleType) -> set[str]:
    """Global names of a modeling file that a model's own modules read, but for those of single steps of decoding."""
    kinds = {type(part) for part in decoder_layers(model).modules()}
    methods = [
        inspect.unwrap(method)
        for kind in kinds
        if inspect.getmodule(kind) is module
        for _, method in inspect.getmembers(kind, inspect.isfunction)
    ]
    names = {name for method in methods for name in inspect.getclosurevars(method).globals}
    return {name for name in names if not any(word in name for word in _OF_A_STEP)}


def _choice(function: Any) -> tuple[str, str, bool] | None:
    """(function, package, whether the package's is taken) of a function with a fallback in torch; else None."""
    found = inspect.unwrap(function, stop=_chooses)
    if not _chooses(found):
        return None
    taken = inspect.getclosurevars(found).nonlocals
    return taken["func_name"], taken["package"], taken["is_new_implementation"]


def _chooses(function: Any) -> bool:
    """Whether this is what transformers' `use_kernel_func_from_hub_with_fallback` makes of a function."""
    if not inspect.isfunction(function):
        return False
    return {"func_name", "package", "is_new_implementation"} <= inspect.getclosurevars(function).nonlocals.keys()
