"""Merging a run in this process, with the losses as numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qdist.core.requests import Merge
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merge as merging


def merge(run: RunDir, out: Path, *, onto: Any, dtype: torch.dtype) -> SimpleNamespace:
    """adapter, dequantized, original; None where there is none."""
    name: Any = str(dtype).removeprefix("torch.")
    losses = merging.merge(Merge(runs=(str(run.path),), out=str(out), onto=onto, dtype=name))
    return SimpleNamespace(**{key: loss and loss.value for key, loss in losses._asdict().items()})
