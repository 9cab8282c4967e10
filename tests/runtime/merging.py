"""Merging a run in this process, with the losses as numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merge as merging
from qdist.runtime.exports.job import Export


def merge(run: RunDir, out: Path, *, onto: Any, dtype: torch.dtype) -> SimpleNamespace:
    """adapter, dequantized, original; None where there is none."""
    name: Any = str(dtype).removeprefix("torch.")
    losses = merging.merge(Export(runs=(run.path,), out=out, onto=onto, dtype=name))
    return SimpleNamespace(**{key: loss and loss.value for key, loss in losses._asdict().items()})
