"""Old GPTQ checkpoints in torch's own files, `.bin` and `.pt`: made safetensors once; nothing that they hold is run."""

import hashlib
import pickle
import shutil
from pathlib import Path

import torch

from qdist.core.errors import ModelError
from qdist.host.cached import CHECKSUMS
from qdist.host.checkpoints import PICKLED
from qdist.host.files import cache_dir, locked, publish_folder
from qdist.host.opening import reason_of, told
from qdist.runtime.packed_folder import entries_of, tensor_files, write_tensors
from qdist.runtime.recorded_sums import keep_computed_sums

_NOT_TENSORS = {"training_args.bin", "optimizer.pt", "scheduler.pt"}


def in_safetensors(folder: Path) -> Path:
    """The folder itself, or one of the cache with the same tensors in safetensors.

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
        raise ModelError(f"{file} is no table of tensors by name", try_="the same checkpoint in safetensors")
    return found
