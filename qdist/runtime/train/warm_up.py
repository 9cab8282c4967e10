"""Reads the weights' files ahead, beside a rank's imports: that needs no Python."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qdist.core.machine.world import LocalRank
from qdist.core.planning.plan import Plan
from qdist.host.machine import probe

_READERS, _BLOCK_BYTES = 4, 8 << 20
_MOST = 0.5
"""Share of the available memory up to which files are read ahead: what does not stay in memory is read twice."""


def warm_up(plan: Plan, local_rank: LocalRank) -> None:
    """Start to read what a rank of a GPU run will wait for; returns at once. What fails is told where it is needed.

    The first rank of a node reads for all. It takes seconds, in which Python imports torch and transformers.
    """
    sharing = probe.ranks_per_gpu()
    if plan.device != "cuda" or sharing > 1:
        return
    if local_rank == 0 and plan.source.packed:
        files = sorted(Path(plan.source.packed).glob("*.safetensors"))
        if fit_memory(files, probe.host_memory(Path("/"))[1]):
            for first in range(_READERS):
                _start(partial(read_ahead, files[first::_READERS]))


def read_ahead(files: Sequence[Path]) -> int:
    """Read files into the page cache; the number of bytes. Stops at one that cannot be read."""
    buffer, count = bytearray(_BLOCK_BYTES), 0
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                while read := file.readinto(buffer):
                    count += read
        except OSError:
            break
    return count


def _start(work: Callable[[], object]) -> None:
    threading.Thread(target=work, daemon=True).start()


def fit_memory(files: Sequence[Path], available_bytes: int) -> bool:
    """Whether files stay in memory once they are read."""
    return sum(file.stat().st_size for file in files) < _MOST * available_bytes
