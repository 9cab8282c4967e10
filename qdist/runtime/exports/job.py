"""What is to be exported, to where, and how: what every target is told."""

from pathlib import Path
from typing import Literal

import msgspec
import torch

from qdist.host.run.rundir import RunDir
from qdist.runtime.exports.backbone import Onto
from qdist.runtime.exports.gguf.blocks import Kind
from qdist.runtime.exports.update import Adapters
from qdist.runtime.model.skeleton import DTYPES


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A way out of one or several runs over one base."""

    runs: tuple[Path, ...]
    out: Path
    """What is written; must not exist, or be an empty folder."""
    weights: tuple[float, ...] = ()
    """What the update of each run is multiplied by; empty for a single run as it is."""
    onto: Onto = "dequantized"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    type: Kind | None = None
    """Of a GGUF file; None: Q4_1 where that rounds nothing but minimums, else F16."""
    data: str = ""
    """Calibration data to quantize with again; empty: the run's own."""
    samples: int = 128
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    """As the run's own checkpoint, where None; else 4 bits and groups of 128."""
    lossy: bool = False
    """Write integer zeros, whatever they lose."""

    @property
    def adapters(self) -> Adapters:
        """Raises RunError for runs that have no adapter, or are not of one base."""
        return Adapters([RunDir(run) for run in self.runs], self.weights)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
