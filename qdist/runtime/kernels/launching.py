"""Triton launches on the current device, wherever its arguments lie."""

import contextlib
from threading import Lock
from typing import Any

import torch

LAUNCHING = Lock()
"""Held by kernels that threads launch on several GPUs at once: Triton compiles and launches for one of them."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one; changing it costs time, and is seldom needed."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
