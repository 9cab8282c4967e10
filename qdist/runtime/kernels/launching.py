"""Triton launches on the device of their arguments."""

import contextlib
from threading import Lock
from typing import Any

import torch

LAUNCHING = Lock()
"""Held by kernels that threads launch on several GPUs: Triton compiles and launches for one at a time."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current; skipped if it already is, because switching takes time."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
