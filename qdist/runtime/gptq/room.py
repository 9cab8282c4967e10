"""Whether a model can be quantized in the memory of the GPUs that are there: asked before anything starts."""

import torch

from qdist.core.errors import JobError, PlanError
from qdist.core.gptq_memory import Needs, needs
from qdist.core.units import format_bytes
from qdist.runtime.gptq.calibrate import LANES, batches, stays
from qdist.runtime.gptq.job import Job

_MARGIN = 1.1
"""What torch cannot help keeping in pieces between tensors. It keeps half as much again where nobody needs it."""
_PARTS = {
    "running": "a batch of samples",
    "summing": "the Hessians of its linears",
    "factoring": "a Hessian and its factors",
    "solving": "a linear at work",
}
_ON_CPU = "CUDA_VISIBLE_DEVICES= in front of the command, to quantize on the CPU, or a GPU with more memory"


def require_memory(job: Job) -> int:
    """Bytes that the fullest GPU will need; 0 on a CPU. Raises PlanError for a GPU with less."""
    found = [0]
    for worker, device in enumerate(_gpus(job.devices)):
        free = torch.cuda.mem_get_info(device)[0]
        need = needed(job, worker, free)
        wanted = int(_MARGIN * need.total)
        if wanted > free:
            raise PlanError(
                f"quantizing {job.name} takes about {format_bytes(wanted)} of GPU {device.index}, which has "
                f"{format_bytes(free)} free: {_told(need)}",
                try_=_ON_CPU,
            )
        found.append(wanted)
    return max(found)


def needed(job: Job, worker: int, free: int) -> Needs:
    """Of a device with so many free bytes."""
    count, tokens = job.samples.shape
    lanes = -(-LANES // len(job.devices))
    hidden = count * tokens * job.decoder.facts.hidden * job.dtype.itemsize * lanes // LANES
    return needs(
        job.decoder.facts, batch=len(batches(job.samples)[0]), tokens=tokens, hidden=hidden * stays(hidden, free),
        lanes=lanes, number_bytes=job.dtype.itemsize, first=worker == 0,
    )  # fmt: skip


def _told(need: Needs) -> str:
    parts = {"a decoder layer": need.layer, "hidden states": need.hidden}
    parts |= {label: getattr(need, name) for name, label in _PARTS.items()}
    return ", ".join(f"{label} {format_bytes(size)}" for label, size in parts.items() if size)


def out_of_memory(devices: tuple[torch.device, ...], error: torch.OutOfMemoryError) -> JobError:
    """What to tell of a GPU that was full after all: bytes of others, or a model that takes more than was expected."""
    lines = []
    for device in _gpus(devices):
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
        lines.append(f" GPU {device.index} has {format_bytes(total)}, others hold {format_bytes(total - free - own)}.")
    return JobError(
        f"GPU memory ran out: {str(error).splitlines()[0]}{''.join(lines)} What is written stays, and the same "
        "command goes on from it",
        try_=_ON_CPU,
    )


def peak(devices: tuple[torch.device, ...]) -> int:
    """Bytes of tensors on the fullest GPU at its fullest; 0 on a CPU."""
    return max(map(torch.cuda.max_memory_allocated, _gpus(devices)), default=0)


def _gpus(devices: tuple[torch.device, ...]) -> list[torch.device]:
    return [device for device in devices if device.type == "cuda"]
