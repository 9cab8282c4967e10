"""What does a CPU rank's resident set hold beside the tensors of a step, and is a step its fullest moment?

Measured with SmolLM2-135M and Qwen2.5-0.5B (torch 2.13, glibc 2.36, 2 cores) by `bench/cpu_memory.py`; docs/runs.md has
the table. Tensors were counted in glibc's own calls, and are what `memory.budget` says to 2 %.
"""

import msgspec

from qdist.core.layouts import Layout
from qdist.core.memory import Job, MemoryBudget
from qdist.core.units import MIB

LIBRARIES_BYTES = 495 * MIB
"""A rank that has imported torch, transformers and peft, read a tokenizer and computed a step, less its tensors: pages
of libraries 110 MiB, objects of Python and C++ 300 to 340, MKL's buffers 30 to 50, loose ends the rest."""
DEEPSPEED_BYTES = 20 * MIB
"""What DeepSpeed's own modules add."""
DEEPSPEED_HOLES_BYTES = 60 * MIB
"""What it leaves of the heap when it has moved parameters, gradients and moments into flat buffers: 45 to 75 over ten
ranks with 119 to 232 MiB of activations, and nothing over two whose GPTQ matrices fill it."""
HOLES, HOLES_16_BIT, HOLES_GPTQ, HOLES_1F1B = 0.14, 0.3, 0.1, 0.06
"""Share of the activations by which the heap outgrows them: small objects lie between tensors, and what was freed there
is too small for the next one. NF4 and int8: 8 to 22 % in ten runs. A 16-bit backbone, without matrices that come and
go and fill holes: 30 and 34 % in two. GPTQ, which unpacks through several matrices at once: 0 to 7 % in four runs over
samples of much the same length, 23 and 46 % in two over samples of many. Stages, whose rows have one width: 0 to 9."""
OWN_PAGES_BYTES = 32 * MIB
"""Tensors from here on have pages of their own, which go back when they are freed: glibc's largest threshold."""


def library_bytes(layout: Layout) -> int:
    """What a rank holds beside tensors, however large they are."""
    return LIBRARIES_BYTES + DEEPSPEED_BYTES * (layout.engine == "deepspeed")


def hole_bytes(job: Job, layout: Layout, activations: int) -> int:
    """What the heap holds of memory that was freed, at its fullest."""
    share = HOLES_GPTQ if job.gptq else HOLES_16_BIT if job.bits == 16 else HOLES
    if layout.schedule == "1f1b":
        share = HOLES_1F1B
    flattened = layout.engine == "deepspeed" and not job.gptq
    return round(share * activations) + DEEPSPEED_HOLES_BYTES * flattened


def resident_set(own: MemoryBudget, *, holes: int, copied: int, alone: bool) -> MemoryBudget:
    """A budget of tensors as a CPU rank's resident set: of a step, or of saving a checkpoint where that is more.

    copied: adapter parameters that this rank has in its hands when it saves or restores, each with both moments.
    alone: gradients are gone by then; those that ranks add up stay.
    """
    step = own.gradients * alone + own.activations + own.logits + own.gathers + holes
    return msgspec.structs.replace(own, context=own.context + holes, gathers=own.gathers + max(0, 12 * copied - step))
