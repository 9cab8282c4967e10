"""What does a CPU rank's resident set hold beside the tensors of a step, and is a step its fullest moment?"""

import msgspec

from qdist.core.layouts import Layout
from qdist.core.memory import MemoryBudget
from qdist.core.units import MIB

LIBRARIES_BYTES = 490 * MIB
"""A rank that has imported torch, transformers and peft, read a tokenizer and computed a step, less its tensors:
libraries' pages 110 MiB, Python's and C++'s objects 300 to 340, MKL's buffers 30 to 50."""
DEEPSPEED_BYTES = 80 * MIB
"""What importing DeepSpeed adds, and its process group's buffers."""
HOLES = 0.12
"""Share of the activations by which the heap outgrows them: small objects lie between tensors, and what was freed there
is too small for the next. 7 to 20 % over 12 runs (SmolLM2); from 32 MiB on glibc gives each tensor pages of its own."""
OWN_PAGES_BYTES = 32 * MIB


def library_bytes(layout: Layout) -> int:
    """What a rank holds before it has loaded anything."""
    return LIBRARIES_BYTES + DEEPSPEED_BYTES * (layout.engine == "deepspeed")


def resident_set(own: MemoryBudget, *, tensor_bytes: int, copied: int, alone: bool) -> MemoryBudget:
    """A budget of tensors as a CPU rank's resident set: with the heap's holes, and at the saving of a checkpoint where
    that takes more than a step.

    tensor_bytes: the activations of one micro-batch between two layers.
    copied: adapter parameters that this rank has in its hands when it saves or restores, each with both moments.
    alone: gradients are gone by then; those that ranks add up stay.
    """
    holes = round(HOLES * own.activations) if tensor_bytes < OWN_PAGES_BYTES else 0
    step = own.gradients * alone + own.activations + own.logits + own.gathers + holes
    return msgspec.structs.replace(
        own, context=own.context + holes, gathers=own.gathers + max(0, 12 * copied - step)
    )  # fmt: skip
