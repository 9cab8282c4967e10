"""Whether flash-linear-attention can train on a machine, by card and versions."""

from importlib import metadata

import pytest

from qdist.core.machine.cluster import hypothetical
from qdist.core.planning.advice import NO_FLA
from qdist.core.text import GIB
from qdist.host.machine.recurrence import fla_problem


@pytest.mark.parametrize(
    ("card", "versions", "problem"),
    [
        ("NVIDIA A100", {"fla-core": "0.6.0", "triton": "3.6.0"}, ""),
        ("NVIDIA H200", {"fla-core": "0.6.0", "triton": "3.7.1"}, ""),
        ("NVIDIA H200", {"fla-core": "0.6.0", "triton": "3.3.1"}, ""),
        (
            "NVIDIA H100",
            {"fla-core": "0.6.0", "triton": "3.6.0"},
            "gives wrong gradients on Hopper with Triton 3.6.0: it needs 3.7.1",
        ),
        ("NVIDIA H200", {"fla-core": "0.6.0"}, "needs triton, which is not installed"),
        ("NVIDIA H200", {"triton": "3.7.1"}, NO_FLA),
    ],
)
def test_fla_is_left_out_where_it_is_missing_or_wrong(card: str, versions: dict[str, str], problem: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    assert fla_problem(hypothetical(1, 80 * GIB, name=card), version) == problem
