"""GPTQ checkpoint folders: written as AutoGPTQ and GPTQModel read them, and converted from torch's pickled files."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import Gptq, to_config
from qdist.core.text import command
from qdist.host.files import cache_dir, locked, publish_folder, write_atomic
from qdist.host.opening import reason_of, told
from qdist.host.sources.cache import CHECKSUMS
from qdist.host.sources.model_folder import PICKLED, QUANTIZE_CONFIG
from qdist.runtime.formats.packed_folder import Entry, Written, entries_of, tensor_files, write_index, write_tensors
from qdist.runtime.formats.recorded_sums import keep_computed_sums, keep_sums


class Quantized(NamedTuple):
    """One linear, [out, in], as stored in the file."""

    qweight: torch.Tensor
    """int32 [in * bits / 32, out]."""
    qzeros: torch.Tensor
    """int32 [groups, out * bits / 32]."""
    scales: torch.Tensor
    """float16 [groups, out]."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each input."""
    bias: torch.Tensor | None = None


def entries(path: str, linear: Quantized) -> list[Entry]:
    """Entries for `packed_folder.write_tensors` for the linear at a module path."""
    return entries_of({f"{path}.{name}": value for name, value in linear._asdict().items() if value is not None})


def finish(folder: Path, config: Mapping[str, Any], gptq: Gptq, files: Mapping[str, Written]) -> None:
    """Write the configurations and the index, without which a folder is unfinished.

    config: the model's own config.json.
    """
    stated = to_config(gptq)
    write_index(folder, files)
    write_atomic(folder / QUANTIZE_CONFIG, json.dumps(stated, indent=2) + "\n")
    write_atomic(folder / "config.json", json.dumps({**config, "quantization_config": stated}, indent=2) + "\n")
    keep_sums(folder, files.values())
    for name in files:
        (folder / f".{name}.json").unlink(missing_ok=True)


def how_to_use(folder: Path, gptq: Gptq) -> str:
    """The last line that a command prints after writing such a folder."""
    bits = ("--bits", gptq.shape.bits) if gptq.shape.bits != 4 else ()
    return f"use it  {command('launch', '--model', folder, '--method', 'gptq-lora', *bits, '--data', 'FILE')}"


_NOT_TENSORS = {"training_args.bin", "optimizer.pt", "scheduler.pt"}


def in_safetensors(folder: Path) -> Path:
    """The folder itself, or one in the cache with the same tensors in safetensors.

    Raises ModelError for a file that holds anything but tensors, or is not whole.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in PICKLED and file.name not in _NOT_TENSORS)
    if tensor_files(folder) or not files:
        return folder
    kept = cache_dir("gptq")
    stamp = "".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)
    out = kept / f"{folder.name}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    with locked(kept / f".{out.name}.lock"):
        if not out.is_dir():
            _convert(folder, files, out)
    return out


def _convert(folder: Path, files: list[Path], out: Path) -> None:
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir()
    try:
        for file in files:
            name = f"{file.stem}.safetensors"
            write_tensors(beside, name, entries_of(_tensors(file)))
            (beside / f".{name}.json").unlink()
        keep_computed_sums(beside)
        for file in folder.iterdir():
            if (
                file.is_file()
                and file not in files
                and file.name != CHECKSUMS
                and not file.name.endswith(".index.json")
            ):
                shutil.copy2(file, beside)
        publish_folder(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with told(str(file), ModelError, try_="download the checkpoint again"):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except ModelError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise ModelError(
            f"{file} holds more than tensors, and nothing of it was run: {reason_of(error.__cause__)}",
            try_="the same checkpoint in safetensors",
        ) from error.__cause__
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelError(f"{file} is not a table of tensors by name", try_="the same checkpoint in safetensors")
    return found
