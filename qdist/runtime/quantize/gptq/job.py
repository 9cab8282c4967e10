"""What to quantize by GPTQ, and whether that is possible, memory included: checked before anything starts."""

import hashlib
import json
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from qdist.core.errors import JobError, ModelError, PlanError, SpecError
from qdist.core.model.gptq import WORD, method_of
from qdist.core.model.storage import Packing
from qdist.core.planning.inference import Needs, needs
from qdist.core.requests import GptqSettings
from qdist.core.text import format_bytes
from qdist.host.sources.cache import source_identity
from qdist.host.sources.models import read_json
from qdist.runtime.data.tokenizer import open_tokenizer
from qdist.runtime.formats.packed_folder import Entry
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq.calibrate import LANES, batches, pieces, stays
from qdist.runtime.quantize.gptq.decoder import Decoder
from qdist.runtime.quantize.pack import goes_along
from qdist.runtime.quantize.source import require_finite
from qdist.runtime.quantize.tensors import Tensors, tensors_of

_VERSION = 4
"""Increment whenever the same source and data would give different bytes."""
_MOST_TOKENS = 2048


class GptqJob(NamedTuple):
    """A model that was read, and its requested quantization."""

    name: str
    """What the user calls the model."""
    folder: Path
    wanted: GptqSettings
    decoder: Decoder
    tensors: Tensors
    samples: torch.Tensor
    devices: tuple[torch.device, ...]

    @property
    def layers(self) -> int:
        return self.decoder.shape.layers

    @property
    def beside(self) -> list[Path]:
        """Files that accompany the weights."""
        return [path for path in sorted(self.folder.iterdir()) if goes_along(path)]

    @property
    def offset(self) -> int:
        """What the format subtracts from a zero."""
        return self.wanted.gptq(4).zero_offset

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states and weights while quantizing: holds every linear as stored; float32 on a CPU."""
        if self.devices[0].type == "cpu":
            return torch.float32
        return reduce(torch.promote_types, map(self.tensors.dtype, self.decoder.shape.linears))

    def plain(self, position: int) -> list[Entry]:
        """Tensors copied unchanged from the source: norms, biases, embeddings, head. Raises ModelError for NaN."""
        shape = self.decoder.shape
        names = [name for name in self.decoder.names(position) if name not in shape.linears]
        return [Entry(n, self.tensors.dtype(n), shape.shapes[n], partial(self._read, n)) for n in names]

    def _read(self, name: str) -> torch.Tensor:
        return require_finite(self.tensors.read(name), name)

    def identity(self) -> str:
        """SHA-256 of what determines the bytes: model files, settings, and the drawn samples."""
        samples = hashlib.sha256(self.samples.numpy().tobytes()).hexdigest()
        source = source_identity(self.folder, Packing(bits=16))
        contents = [_VERSION, source, msgspec.to_builtins(self.wanted), samples, str(self.dtype)]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def read_job(name: str, folder: Path, wanted: GptqSettings, devices: tuple[torch.device, ...]) -> GptqJob:
    """Read a model folder and draw its calibration samples.

    Raises ModelError, DataError or SpecError where they do not fit each other or GPTQ.
    """
    _refuse_quantized(folder, name)
    shape = blueprint(folder)
    tensors = tensors_of(folder, shape)
    decoder = Decoder(shape, tensors)
    _require_words(decoder, name)
    most = decoder.facts.max_positions
    if wanted.seq_len > most:
        raise SpecError(f"samples of {wanted.seq_len} tokens are longer than the {most} that {name} takes",
                        try_=f"--seq-len {most}")  # fmt: skip
    tokens = wanted.seq_len or min(_MOST_TOKENS, most)
    tokenizer = open_tokenizer(folder, f"{name} has no tokenizer to read calibration data with")
    samples = pieces(wanted, tokenizer, seq_len=tokens)
    if int(samples.max()) >= decoder.facts.vocab:
        raise ModelError(
            f"the tokenizer of {name} gives token {int(samples.max())}, of {decoder.facts.vocab} that it has"
        )
    job = GptqJob(name, folder, wanted, decoder, tensors, samples, devices)
    for entry in job.plain(job.layers):  # written last, after hours of layers
        entry.make()
    return job


def _require_words(decoder: Decoder, name: str) -> None:
    for linear in decoder.facts.linears:
        for size, side in ((linear.inputs, "inputs"), (linear.outputs, "outputs")):
            if size % WORD:
                raise ModelError(
                    f"{name}: {linear.name} has {size} {side}, which fill no words: multiples of {WORD} do",
                    try_="--method nf4",
                )


def _refuse_quantized(folder: Path, name: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        return  # refused where it is read
    stored = read_json(config).get("quantization_config")
    if stored:
        method = method_of(stored) or "bitsandbytes"
        raise ModelError(f"{name} is quantized already, with {method}", try_="the 16-bit model that it was made from")


_MARGIN = 1.1
"""Factor for memory fragmentation in torch, which without pressure keeps half as much again."""
_PARTS = {
    "running": "a batch of samples",
    "summing": "the Hessians of its linears",
    "factoring": "a Hessian and its factors",
    "solving": "a linear at work",
}
_ON_CPU = "CUDA_VISIBLE_DEVICES= in front of the command, to quantize on the CPU, or a GPU with more memory"


def require_memory(job: GptqJob) -> int:
    """Bytes that the fullest GPU will need; 0 on a CPU. Raises PlanError if a GPU has less."""
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


def needed(job: GptqJob, worker: int, free: int) -> Needs:
    """Bytes needed on one device that has `free` bytes free."""
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
    """The error for a GPU that ran out of memory: through other processes, or a model larger than expected."""
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
    """Peak tensor bytes on the fullest GPU; 0 on a CPU."""
    return max(map(torch.cuda.max_memory_allocated, _gpus(devices)), default=0)


def _gpus(devices: tuple[torch.device, ...]) -> list[torch.device]:
    return [device for device in devices if device.type == "cuda"]
