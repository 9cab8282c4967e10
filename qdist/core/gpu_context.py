"""What does a rank hold on its GPU beside torch's tensors: CUDA's context, and NCCL's communicators?"""

from qdist.core.layouts import Layout
from qdist.core.units import MIB

CUDA_CONTEXT_BYTES = 830 * MIB
"""CUDA context, kernels and cuBLAS workspaces of one rank (H200: used less what torch reserved)."""
COMMUNICATOR_BYTES = 840 * MIB
"""What NCCL takes of each GPU of an NVLink pair for a first communicator (2 H200s, NCCL 2.28)."""
SECOND_COMMUNICATOR_BYTES = 430 * MIB
"""For one of DeepSpeed's or of a group of GPUs beside the first."""
NARROW_COMMUNICATOR_BYTES, NARROW_SECOND_BYTES = 504 * MIB, 150 * MIB
"""The same with the few channels that a pipeline gets, which never gathers weights (render.STAGE_CHANNELS)."""
STAGE_LINK_BYTES = 390 * MIB
"""For sending to a neighbouring stage and receiving from it: 960 MiB with all channels, of which these keep 0.4."""


def cuda_context_bytes(layout: Layout, neighbours: int = 0) -> int:
    """Of a rank. neighbours: stages of a pipeline that it sends to or receives from."""
    if layout.world_size == 1:
        return CUDA_CONTEXT_BYTES
    first, second = COMMUNICATOR_BYTES, SECOND_COMMUNICATOR_BYTES
    if layout.schedule == "1f1b":
        first, second = NARROW_COMMUNICATOR_BYTES, NARROW_SECOND_BYTES
    own = first + second * (not layout.one_communicator)
    return CUDA_CONTEXT_BYTES + own + neighbours * STAGE_LINK_BYTES
