"""Writes runs' merged 16-bit model: a folder of safetensors, a file a decoder layer, that plain transformers loads.

One matrix is in memory at a time, whatever the size of the model. Killed, the same command goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from qdist.core.units import counted, format_bytes, format_duration
from qdist.host.disk import require_space
from qdist.host.terminal import say
from qdist.runtime.exports.backbone import Backbone, Onto
from qdist.runtime.exports.job import Export
from qdist.runtime.exports.merged import Merged
from qdist.runtime.exports.model_files import write_model_files
from qdist.runtime.exports.update import Adapters
from qdist.runtime.packed_folder import Entry, Written, file_name, finished, write_index, write_tensors
from qdist.runtime.recorded_sums import keep_sums
from qdist.runtime.work_folder import filled, reserved

_VERSION = 1
"""Raise it whenever the same runs would become other bytes."""
_BESIDE_BYTES = 32 << 20
"""Of tokenizer, index and configurations, at most."""
_TELL_S = 10.0
"""How often writing says how far it is."""


def run(job: Export) -> None:
    """Write the model, and say what it is."""
    began = time.monotonic()
    size = write(job.adapters, job.out, onto=job.onto, dtype=job.torch_dtype)
    took = format_duration(time.monotonic() - began)
    what = f"{counted(len(job.runs), 'adapter')} merged onto the {job.onto} backbone, {job.dtype}"
    say(f"{job.out}: {what}, {format_bytes(size)}, {took}")


def write(adapters: Adapters, out: Path, *, onto: Onto, dtype: torch.dtype) -> int:
    """The sum W + factor B A is taken in float32 and rounded once. Gives the bytes of all tensors.

    out: must be empty or absent. dtype: bfloat16 or float16.
    Raises RunError where `out` is there, or the original is not to be had; ModelError for a weight that float16 does
    not hold; PlanError when the disk is too small.
    """
    with reserved(out):
        merged = Merged(Backbone(adapters.plan, onto=onto), adapters, dtype)
        files = _files(merged)
        with filled(out, _identity(merged, onto)) as work:
            written = {name: there for name in files if (there := finished(work, name))}
            missing = sum(entry.bytes for name in files if name not in written for entry in files[name])
            require_space(out.parent, missing + _BESIDE_BYTES, purpose=f"writing {out.name}")
            _write(work, files, written)
            backbone = merged.backbone
            write_model_files(work, backbone.model, backbone.plan, dtype)
            keep_sums(work, written.values())
            write_index(work, written)
    return sum(part.tensor_bytes for part in written.values())


def _files(merged: Merged) -> dict[str, list[Entry]]:
    """What is in each file; nothing is computed yet."""
    layers = merged.backbone.layers
    files: dict[str, list[Entry]] = {file_name(position, layers): [] for position in range(layers + 1)}
    for weight in merged.weights():
        entry = Entry(weight.name, merged.dtype, weight.shape, partial(merged.read, weight.name))
        files[file_name(weight.position, layers)].append(entry)
    return files


def _identity(merged: Merged, onto: Onto) -> str:
    """SHA-256 of what decides the bytes: adapters and their weights, the backbone, and to what they are merged."""
    contents = [_VERSION, merged.adapters.stamp, onto, str(merged.dtype), merged.backbone.identity()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _write(work: Path, files: dict[str, list[Entry]], written: dict[str, Written]) -> None:
    """The files that are not there yet, added to `written`."""
    progress = _Progress(files, written)
    for name, entries in files.items():
        if name not in written:
            written[name] = write_tensors(work, name, entries)
            progress.done(written)


class _Progress:
    """Says on stderr how far a long export is."""

    def __init__(self, files: dict[str, list[Entry]], written: Collection[str]) -> None:
        self._files, self._told = files, time.monotonic()
        if written:
            say(f"{len(written)} of {len(files)} files are there already", err=True)

    def done(self, written: dict[str, Written]) -> None:
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            size = format_bytes(sum(part.tensor_bytes for part in written.values()))
            say(f"  {len(written)} of {len(self._files)} files, {size}", err=True)
