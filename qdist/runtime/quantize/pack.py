"""Packs a model folder as bitsandbytes stores it, one decoder layer at a time; resumes after a kill."""

import math
import shutil
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.model.storage import Packing
from qdist.core.text import counted, format_bytes
from qdist.host.files import publish_folder, require_space
from qdist.host.progress import ProgressLine
from qdist.host.sources.cache import BESIDE, CHECKSUMS, source_identity, work_folder
from qdist.host.sources.model_folder import fingerprint
from qdist.host.terminal import say
from qdist.runtime.data.tokenizer import TEMPLATES, copy_beside
from qdist.runtime.formats.packed_folder import (
    MANIFEST,
    Entry,
    Manifest,
    Written,
    entries_of,
    file_name,
    finish,
    finished,
    write_tensors,
)
from qdist.runtime.formats.packing import pack_experts, pack_matrix, packed_bytes, packed_experts_bytes
from qdist.runtime.quantize.blueprint import Blueprint, blueprint
from qdist.runtime.quantize.source import require_finite
from qdist.runtime.quantize.tensors import Tensors, tensors_of

_HEADER_BYTES = 1 << 10
"""Upper bound on the bytes that one packed linear takes in a file's header."""
_LARGEST = torch.finfo(torch.float16).max


class PackJob(NamedTuple):
    """A model folder that was read, and its requested packing."""

    folder: Path
    packing: Packing
    shape: Blueprint
    tensors: Tensors

    def names(self, position: int) -> list[str]:
        """Names of the tensors of a decoder layer, or of everything else."""
        return [name for name in self.shape.shapes if self.shape.layer(name) == position]

    def packs(self, name: str) -> bool:
        return self.packing.bits < 16 and name in self.shape.linears

    def packs_experts(self, name: str) -> bool:
        return self.packing.bits < 16 and name in self.shape.experts

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in, or packed from."""
        stored = self.tensors.dtype(name)
        plain: torch.dtype = getattr(torch, self.packing.dtype) if self.packing.dtype != "auto" else stored
        return plain if stored.is_floating_point else stored

    def source_bytes(self, position: int) -> int:
        return sum(math.prod(self.shape.shapes[name]) * self.tensors.dtype(name).itemsize
                   for name in self.names(position))  # fmt: skip

    def bytes(self, position: int) -> int:
        """Bytes of a file that does not exist yet, slightly overestimated."""
        total = 0
        for name in self.names(position):
            total += _HEADER_BYTES + self._bytes_of(name)
        return total

    def _bytes_of(self, name: str) -> int:
        size = self.shape.shapes[name]
        if self.packs(name):
            return packed_bytes(self.shape.packed_shape(name), self.packing)
        if self.packs_experts(name):
            return packed_experts_bytes(size, self.packing)
        return math.prod(size) * self.dtype(name).itemsize


def pack(folder: Path, out: Path, packing: Packing, *, name: str) -> Manifest:
    """Write `out`, which must not exist, through a temporary folder that survives a kill and is renamed at the end.

    name: what the user calls the model.
    Raises ModelError for a model that cannot be read, PlanError when the disk is too small.
    """
    shape = blueprint(folder)
    job = PackJob(folder, packing, shape, tensors_of(folder, shape))
    identity = source_identity(folder, packing)
    work = _work_folder(out, identity)
    files = {file_name(position, shape.layers): position for position in range(shape.layers + 1)}
    written = {file: there for file in files if (there := finished(work, file))}
    others = [path for path in sorted(folder.iterdir()) if goes_along(path)]
    _require_space(job, [files[file] for file in files if file not in written], others, out, name)
    work.mkdir(exist_ok=True)
    (work / ".identity").write_text(identity)
    _write_missing(job, work, files, written, name)
    for path in others:
        copy_beside(path, work)
    _write_config(job, work)
    manifest = Manifest(
        packing=packing,
        source=str(folder.resolve()),
        source_identity=identity,
        source_fingerprint=fingerprint(folder),
        layers=shape.layers,
        bytes=sum(part.tensor_bytes for part in written.values()),
        files={file: written[file].bytes for file in files},
        checksums={tensor: sums for file in files for tensor, sums in written[file].checksums.items()},
        versions={package: metadata.version(package) for package in ("bitsandbytes", "torch", "transformers")},
        note=_note(job),
    )
    (work / ".identity").unlink()
    finish(work, written, manifest)
    publish_folder(work, out)
    return manifest


def _note(job: PackJob) -> str:
    """What bitsandbytes in transformers, which packs linears alone, does not read."""
    packed = sum(job.packs_experts(name) for name in job.shape.shapes)
    if not packed:
        return ""
    return f"{counted(packed, 'parameter')} of experts packed too, which bitsandbytes in transformers does not read"


def _write_missing(job: PackJob, work: Path, files: dict[str, int], written: dict[str, Written], name: str) -> None:
    """Write the missing files, adding them to `written`."""
    size = format_bytes(sum(job.bytes(position) for position in files.values()))
    again = f"; {len(written)} of {len(files)} files are there already" if written else ""
    say(f"packing {name} to {job.packing}, once: {size}{again}", err=True)
    sizes = {file: job.source_bytes(position) for file, position in files.items()}
    done = sum(sizes[file] for file in written)
    with ProgressLine(sum(sizes.values()), "read", done=done, in_bytes=True) as progress:
        for file, position in files.items():
            if file not in written:
                written[file] = write_tensors(work, file, _entries(job, position))
                where = f"layer {min(position + 1, job.shape.layers)} of {job.shape.layers}"
                progress.advance(sizes[file], where)


def _work_folder(out: Path, identity: str) -> Path:
    """The folder next to `out` with what an earlier process finished, if it packed the same."""
    work = work_folder(out)
    mark = work / ".identity"
    if work.is_dir() and (not mark.is_file() or mark.read_bytes() != identity.encode()):
        shutil.rmtree(work)
    for leftover in work.glob(".*.unfinished"):
        leftover.unlink()
    return work


def _require_space(job: PackJob, positions: list[int], others: list[Path], out: Path, name: str) -> None:
    needed = sum(job.bytes(position) for position in positions) + sum(path.stat().st_size for path in others)
    require_space(
        out.parent,
        needed,
        purpose=f"packing {name} to {job.packing}",
        try_="another disk: --out FOLDER, or QDIST_CACHE=FOLDER for what `launch` keeps",
    )


def _entries(job: PackJob, position: int) -> list[Entry]:
    """A file's tensors: linears and experts packed now, the others read when they are written."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    entries = []
    for name in job.names(position):
        if job.packs(name):
            value = _packable(job, name, job.tensors.read(name))
            whole = value.t().contiguous() if name in job.shape.transposed else value
            path = name.removesuffix("weight")
            entries += _named(path, pack_matrix(whole, job.packing, device))
        elif job.packs_experts(name):
            matrices = (_packable(job, name, matrix) for matrix in job.tensors.matrices(name))
            entries += _named(name, pack_experts(matrices, job.packing, device))
        else:
            entries.append(Entry(name, job.dtype(name), job.shape.shapes[name], partial(_plain, job, name)))
    return entries


def _named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    return entries_of({prefix + suffix: part for suffix, part in tensors.items()})


def _packable(job: PackJob, name: str, stored: torch.Tensor) -> torch.Tensor:
    """A matrix as it is packed. Raises ModelError if it is not finite or exceeds the range that int8 is packed from."""
    value = require_finite(stored, name).to(job.dtype(name))
    if job.packing.bits == 8:
        low, high = (float(end) for end in value.aminmax())
        if max(-low, high) > _LARGEST:
            raise ModelError(
                f"{name} reaches {max(-low, high):.3g}, and int8 is packed from float16, which ends at {_LARGEST:,.0f}",
                try_="4 bits",
            )
    return value


def _plain(job: PackJob, name: str) -> torch.Tensor:
    return require_finite(job.tensors.read(name), name)


def _write_config(job: PackJob, work: Path) -> None:
    """config.json, as transformers' `save_pretrained` writes it for a bitsandbytes model."""
    config = job.shape.config
    config.architectures = [job.shape.architecture]
    config.dtype = job.dtype(min(job.shape.linears | job.shape.experts))
    if job.packing.bits < 16:
        config.quantization_config = _quantization(job.packing, config.dtype, job.shape.skipped)
    config.save_pretrained(work)


def _quantization(packing: Packing, dtype: torch.dtype, skipped: tuple[str, ...] | None) -> Any:
    from transformers import BitsAndBytesConfig

    skip = None if skipped is None else list(skipped)
    if packing.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=packing.type,
        bnb_4bit_use_double_quant=packing.double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def goes_along(path: Path) -> bool:
    """Whether a file is copied unchanged: tokenizer, chat templates, generation settings."""
    if path.name == TEMPLATES and path.is_dir():
        return True
    ours = (
        path.name in ("config.json", MANIFEST, CHECKSUMS)
        or path.name.endswith(".index.json")
        or path.name.startswith(".")
    )
    return path.is_file() and path.suffix in BESIDE and not ours
