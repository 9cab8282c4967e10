"""Does a folder still hold the tensors that a run was trained on? Told without reading all of them."""

import hashlib
from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.plan import Source
from qdist.host.checkpoints import PICKLED, safetensors_of

_BLOCKS, _BLOCK_BYTES = 64, 1 << 12
"""What is read of each file beside its header; one of up to 256 KiB is read whole."""
_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""


def fingerprint(folder: Path) -> str:
    """SHA-256 over name, size, header and 64 blocks, spread evenly, of each of a folder's files of weights.

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
    """Refuse a folder whose tensors are not those that a run was prepared with.

    folder: where the packed weights of `source` lie now. run: what the user calls it.
    A run that has no fingerprint is taken as it is.
    """
    _require(source.fingerprint, folder, run)


def require_same_original(source: Source, *, run: str) -> None:
    """Refuse a model that is not the one from which a run's packed weights were made, where these are made again, or
    its own are wanted. run: what the user calls it.

    A run that has no fingerprint is taken as it is.
    """
    _require(source.original, source.path, run)


def require_same_model(old: Source, new: Source, *, run: str) -> None:
    """Refuse what was prepared of another model than a run's own. run: what the user calls it."""
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
    """Names of a folder's safetensors; of torch's own files where there are none."""
    return safetensors_of(folder) or tuple(sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED))


def _add_contents(sums: "hashlib._Hash", path: Path, size: int) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # safetensors begin with that of their header
        sums.update(file.read(min(length, _HEADER_BYTES)))
        last = max(0, size - _BLOCK_BYTES)
        for start in sorted({last * index // (_BLOCKS - 1) for index in range(_BLOCKS)}):
            file.seek(start)
            sums.update(file.read(_BLOCK_BYTES))
