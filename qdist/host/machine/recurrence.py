"""Can flash-linear-attention's kernels train on this machine?"""

import re
from collections.abc import Callable
from importlib import metadata

from qdist.core.machine.cluster import Cluster
from qdist.core.planning.advice import NO_FLA

_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
_WRONG_FROM, _RIGHT_FROM = (3, 4), (3, 7, 1)
"""Versions of Triton that compile the backward pass of a gated delta rule to wrong gradients on Hopper; fla 0.6 refuses
them (flash-linear-attention issue 640)."""
Version = Callable[[str], str]


def fla_problem(cluster: Cluster, version: Version = metadata.version) -> str:
    """Why flash-linear-attention is not used, a phrase to follow its name; empty if it is.

    version: the installed version of a distribution; raises PackageNotFoundError.
    """
    try:
        version("fla-core")
        triton = version("triton")
    except metadata.PackageNotFoundError as missing:
        return NO_FLA if missing.name == "fla-core" else f"needs {missing.name}, which is not installed"
    hopper = any(_HOPPER.search(gpu.name) for gpu in cluster.gpus)
    if hopper and _WRONG_FROM <= _numbers(triton) < _RIGHT_FROM:
        right = ".".join(map(str, _RIGHT_FROM))
        return f"gives wrong gradients on Hopper with Triton {triton}: it needs {right}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
