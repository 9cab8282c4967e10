"""Imports bitsandbytes without importing torch's compiler beside it."""

import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib import import_module
from typing import Any

import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes; what it decorates with `torch.compile` is compiled at its first call.

    bitsandbytes 0.50 compiles reference versions of its operators as it is imported, which imports torch's inductor,
    sympy and networkx: 1.1 s of the 7 s of CPU time that a rank's imports take (torch 2.13). Ranks hardly call them.
    """
    if "bitsandbytes" in sys.modules:
        return
    compile_now = torch.compile
    torch.compile = partial(_compile_later, compile_now)
    try:
        import_module("bitsandbytes")
    finally:
        torch.compile = compile_now


def _compile_later(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, put off until the function is called."""
    if function is None:
        return partial(_compile_later, compile_now, **options)
    compiled = cache(partial(compile_now, function, **options))

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return compiled()(*given, **named)

    return call
