"""What does a process hold beside torch's tensors: CUDA's context, NCCL's communicators, a CPU rank's resident set?"""

import msgspec

from qdist.core.machine.world import World, is_even
from qdist.core.planning.memory import MemoryBudget, TrainingShape
from qdist.core.planning.placements.base import Layout
from qdist.core.text import MIB

LIBRARIES_BYTES = 495 * MIB
"""A rank that has imported torch, transformers and peft, read a tokenizer and computed a step, less its tensors: pages
of libraries 110 MiB, objects of Python and C++ 300 to 340, MKL's buffers 30 to 50, loose ends the rest."""
DEEPSPEED_BYTES = 20 * MIB
"""Bytes that DeepSpeed's own modules add."""
DEEPSPEED_HOLES_BYTES = 60 * MIB
"""What it leaves of the heap when it has moved parameters, gradients and moments into flat buffers: 45 to 75 over ten
ranks with 119 to 232 MiB of activations, and nothing over two whose GPTQ matrices fill it."""
HOLES, HOLES_16_BIT, HOLES_GPTQ, HOLES_STAGES = 0.14, 0.3, 0.1, 0.06
"""Share of the activations by which the heap outgrows them: small objects lie between tensors, and what was freed there
is too small for the next one. NF4 and int8: 8 to 22 % in ten runs. A 16-bit backbone, without matrices that come and
go and fill holes: 30 and 34 % in two. GPTQ, which unpacks through several matrices at once: 0 to 7 % in four runs over
samples of much the same length, 23 and 46 % in two over samples of many. Stages, whose rows have one width: 0 to 9."""
GRAPH_LAYER_BYTES = 3.2 * MIB
"""What the driver keeps of a CUDA graph for each layer, some 190 kernels of both passes: an estimate."""
OWN_PAGES_BYTES = 32 * MIB
"""Tensors from here on have pages of their own, which go back when they are freed: glibc's largest threshold."""


def library_bytes(layout: Layout) -> int:
    """Bytes that a rank holds besides tensors, whatever their size."""
    return LIBRARIES_BYTES + DEEPSPEED_BYTES * (layout.engine == "deepspeed")


def graph_bytes(layers: int) -> int:
    """Bytes that a captured micro-batch takes beside tensors, whose memory is that of passes without a graph."""
    return round(GRAPH_LAYER_BYTES * layers)


def hole_bytes(job: TrainingShape, layout: Layout, activations: int) -> int:
    """Bytes of freed memory that the heap still holds at its peak."""
    share = HOLES_GPTQ if job.gptq else HOLES_16_BIT if job.bits == 16 else HOLES
    if layout.stages > 1:
        share = HOLES_STAGES
    flattened = layout.engine == "deepspeed" and not job.gptq
    return round(share * activations) + DEEPSPEED_HOLES_BYTES * flattened


def resident_set(own: MemoryBudget, *, holes: int, copied: int, alone: bool) -> MemoryBudget:
    """A budget of tensors as a CPU rank's resident set: of a step, or of saving a checkpoint where that is more.

    copied: adapter parameters that this rank has in its hands when it saves or restores, each with both moments.
    alone: gradients are gone by then; those that ranks add up stay.
    """
    step = own.gradients * alone + own.activations + own.logits + own.gathers + holes
    return msgspec.structs.replace(own, context=own.context + holes, gathers=own.gathers + max(0, 12 * copied - step))


CUDA_CONTEXT_BYTES = 830 * MIB
"""Bytes of CUDA context, kernels and cuBLAS workspaces of one rank (H200: used minus reserved by torch)."""
COMMUNICATOR_BYTES = 840 * MIB
"""Bytes that NCCL's first communicator takes on each GPU of an NVLink pair (2 H200s, NCCL 2.28)."""
SECOND_COMMUNICATOR_BYTES = 430 * MIB
"""Bytes of a second communicator: DeepSpeed's, or one for a group of GPUs."""
NARROW_COMMUNICATOR_BYTES, NARROW_SECOND_BYTES = 504 * MIB, 150 * MIB
"""The same with a pipeline's few channels, since it never gathers weights (render.STAGE_CHANNELS)."""
STAGE_LINK_BYTES = 390 * MIB
"""Bytes for sending to and receiving from a neighbouring stage: 960 MiB with all channels, 0.4 of it with these."""


def narrow_context_bytes(world: World) -> int:
    """Bytes that NCCL takes more of each GPU where gradients cross in 16 bits.

    Links from rank to rank, as to a neighbouring stage, and on even nodes two communicators: not measured.
    """
    return STAGE_LINK_BYTES + 2 * SECOND_COMMUNICATOR_BYTES * is_even(world.ranks_of_nodes)


def cuda_context_bytes(layout: Layout, position: int) -> int:
    """Bytes of CUDA context and communicators of the rank at a position of its group."""
    if layout.world_size == 1:
        return CUDA_CONTEXT_BYTES
    first, second = COMMUNICATOR_BYTES, SECOND_COMMUNICATOR_BYTES
    if layout.stages > 1:
        first, second = NARROW_COMMUNICATOR_BYTES, NARROW_SECOND_BYTES
    own = first + second * (not layout.one_communicator)
    return CUDA_CONTEXT_BYTES + own + layout.neighbours(position) * STAGE_LINK_BYTES
