"""Triton launches on the current device, wherever its arguments lie."""

import contextlib
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one; changing it costs time, and is seldom needed."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
