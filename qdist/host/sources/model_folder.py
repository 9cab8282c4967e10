"""Whether a run can train on a model's folder, and whether its tensors are unchanged; small reads only."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qdist.core.errors import ModelError, RunError
from qdist.core.model.gptq import Gptq, method_of, of_run, stated_by, to_config
from qdist.core.planning.plan import Source
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import command
from qdist.host.opening import converted
from qdist.host.sources.models import read_json

PICKLED = (".bin", ".pt", ".pth")
"""Suffixes of torch's own pickled files."""
INDEX, QUANTIZE_CONFIG = "model.safetensors.index.json", "quantize_config.json"


def gptq_of(spec: RunSpec, config: Mapping[str, object], folder: Path | None = None) -> Gptq | None:
    """How GPTQ quantizes a run's backbone; None if it is not GPTQ.

    config: the content of the model's config.json.
    folder: where the model lies; by default where its name says, and an alias lies nowhere: its weights are random.
    Raises ModelError for a folder that is not a GPTQ checkpoint, contradicts itself or lacks files; SpecError where the
    method and the model do not go together.
    """
    folder = folder or Path(spec.model).expanduser()
    if spec.load_format == "dummy" or not folder.is_dir():
        return of_run(spec, config)
    folder = folder.resolve()
    found = stated(folder)
    if of_run(spec, {**config, "quantization_config": to_config(found)} if found else config) is None:
        return None
    if found is None:
        raise _not_gptq(spec.model, config)
    _require_files(folder)
    return found


def _not_gptq(name: str, config: Mapping[str, object]) -> ModelError:
    """The error that names what to quantize instead: the model itself, or what it was packed from."""
    stored = config.get("quantization_config")
    if isinstance(stored, Mapping) and stored:
        return ModelError(
            f"{name} is quantized with {method_of(stored) or 'bitsandbytes'} and is not a GPTQ checkpoint",
            try_=f"the 16-bit model that it was made from: {_quantizing('MODEL')}",
        )
    return ModelError(f"{name} is not a GPTQ checkpoint", try_=f"{_quantizing(name)}, or --method qlora")


def _quantizing(model: str) -> str:
    return command("quantize", model, "--method", "gptq", "--data", "DATA", "--out", "DIR")


def stated(folder: Path) -> Gptq | None:
    """What the two configurations in a folder say about GPTQ; see `stated_by`."""
    config, beside = read_json(folder / "config.json"), folder / QUANTIZE_CONFIG
    return stated_by(config, read_json(beside) if beside.is_file() else None, name=str(folder))


def weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor according to a folder's index; None without an index."""
    index = folder / INDEX
    if not index.is_file():
        return None
    again = "download the model again"
    found = read_json(index).get("weight_map")
    if found is None:
        raise ModelError(f"{index} has no weight_map", try_=again)
    return converted(found, dict[str, str], f"{index}: weight_map", ModelError, try_=again)


def safetensors_of(folder: Path) -> tuple[str, ...]:
    """Safetensors files that a folder's index names, or all in the folder if it has no index."""
    indexed = weight_map(folder)
    if indexed is None:
        return tuple(sorted(file.name for file in folder.glob("*.safetensors")))
    return tuple(sorted(set(indexed.values())))


def _require_files(folder: Path) -> None:
    names = safetensors_of(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX} names: {missing[0]}"
            + (" and others" if len(missing) > 1 else ""),
            try_="download the checkpoint again, or qdist quantize the model that it was made from",
        )


_BLOCKS, _BLOCK_BYTES = 64, 1 << 12
"""Blocks read from each file besides its header, and their bytes; up to 256 KiB the whole file is read."""
_HEADER_BYTES = 100_000_000
"""safetensors' own limit on header bytes."""


def fingerprint(folder: Path) -> str:
    """SHA-256 over name, size, header and 64 evenly spaced blocks of each weights file in a folder.

    Times and places do not count: a copy has the same. Another quantization changes every block; a few bytes that
    were changed by hand may lie between them.
    """
    sums = hashlib.sha256()
    for name in _weights_of(folder):
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        sums.update(f"{name} {size}\n".encode())
        if size > 0:
            _add_contents(sums, path, size)
    return sums.hexdigest()


def require_same_tensors(source: Source, folder: str, *, run: str) -> None:
    """Refuse a folder whose tensors differ from those that a run was prepared with.

    folder: where the packed weights of `source` lie now. run: what the user calls it.
    A run that has no fingerprint is taken as it is.
    """
    _require(source.fingerprint, folder, run)


def require_same_original(source: Source, *, run: str) -> None:
    """Refuse a model other than the one that a run's packed weights were made from.

    Needed before packing again, and where the original weights are used. run: what the user calls it.
    A run without a fingerprint is accepted.
    """
    _require(source.original, source.path, run)


def require_same_model(old: Source, new: Source, *, run: str) -> None:
    """Refuse files prepared from another model than the run's own. run: what the user calls it."""
    if new.original:
        _compare(old.original, new.original, new.path, run)


def _require(recorded: str, folder: str, run: str) -> None:
    if recorded:
        _compare(recorded, fingerprint(Path(folder)), folder, run)


def _compare(recorded: str, found: str, folder: str, run: str) -> None:
    if recorded and found != recorded:
        raise RunError(
            f"{folder} is not the model that {run} was trained on: the fingerprint of its tensors is {found[:12]}, "
            f"and was {recorded[:12]}",
            try_="put that model back in its place, or start a new run on this one",
        )


def _weights_of(folder: Path) -> tuple[str, ...]:
    """Names of a folder's safetensors files, or of torch's own files if there are none."""
    return safetensors_of(folder) or tuple(sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED))


def _add_contents(sums: "hashlib._Hash", path: Path, size: int) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # safetensors begin with that of their header
        sums.update(file.read(min(length, _HEADER_BYTES)))
        last = max(0, size - _BLOCK_BYTES)
        for start in sorted({last * index // (_BLOCKS - 1) for index in range(_BLOCKS)}):
            file.seek(start)
            sums.update(file.read(_BLOCK_BYTES))
