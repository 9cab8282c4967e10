"""Where the checksums of a folder's tensors are: in it if qdist wrote it, in the cache, or in a file's header."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from qdist.core.errors import ModelError, RunError
from qdist.core.planning.plan import Source
from qdist.core.text import command
from qdist.host.files import cache_dir, cache_path, write_atomic
from qdist.host.opening import decoded, read_bytes, read_object
from qdist.host.sources.cache import CHECKSUMS, remembered_of
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.formats.checksum import SumCheck, Sums, again, digest_of, tensor_checksum
from qdist.runtime.formats.packed_folder import Written, opened, read_manifest, tensor_files

_THREADS = 4
"""Threads that checksum a folder's files; more do not read memory any faster."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of `checksums.json`."""

    tensors: dict[str, tuple[int, int]]


def keep_sums(folder: Path, files: Iterable[Written]) -> None:
    """Record the checksums of a folder's tensors in it. files: all that were written."""
    _write(folder / CHECKSUMS, {name: pair for written in files for name, pair in written.checksums.items()})


def keep_computed_sums(folder: Path) -> None:
    """Record the checksums of files that another library wrote, by reading them again."""
    _write(folder / CHECKSUMS, computed_sums(folder))


def stated_sums(folder: Path) -> Sums | None:
    """The checksums that a folder states for its tensors; None if it states none. Raises ModelError if incomplete."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.checksums
    return _read(folder / CHECKSUMS, folder)


def computed_sums(folder: Path) -> Sums:
    """The checksums of all tensors in a folder, computed now."""
    files = sorted(set(tensor_files(folder).values()))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, min(_THREADS, threads, len(files)))) as pool:
        parts = list(pool.map(lambda file: _file_sums(folder / file), files))
    return {name: pair for part in parts for name, pair in part.items()}


def digest_of_folder(folder: Path) -> str:
    """`digest_of` a folder's checksums. Those that it does not state are computed and cached.

    The cache knows what was computed by the files' paths, sizes, times and inodes.
    """
    stated = stated_sums(folder)
    if stated is not None:
        return digest_of(stated)
    files = [folder / name for name in sorted(set(tensor_files(folder).values()))]
    return remembered_of("tensors", files, lambda: _kept(computed_sums(folder)))


def expected_sums(source: Source) -> Sums | None:
    """Expected checksums of the tensors in `source.packed`; None for runs of a qdist that recorded no digest.

    Raises RunError if they are those of another model.
    """
    folder = Path(source.packed)
    stated = stated_sums(folder)
    if not source.digest:
        return stated
    if stated is None and (kept := _read(_record(source.digest), cache_path() / "sums")):
        stated = kept
    sums = computed_sums(folder) if stated is None else stated
    if digest_of(sums) != source.digest:
        raise RunError(
            f"{folder} does not hold the tensors that the run was prepared with: their digest is "
            f"{digest_of(sums)[:12]}, and was {source.digest[:12]}",
            try_=again(folder),
        )
    if stated is None:
        _kept(sums)
    return sums


def verify_folder(folder: Path) -> None:
    """Verify a folder that states its checksums, for readers that cannot. Raises ModelError naming a tensor."""
    stated = stated_sums(folder)
    if stated is None:
        return
    for file in sorted(set(tensor_files(folder).values())):
        check = SumCheck(stated)
        with opened(folder / file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                check.add(folder / file, name, handle.get_tensor(name))
        check.finish()


def _file_sums(file: Path) -> dict[str, tuple[int, int]]:
    with opened(file) as handle:
        return {name: tensor_checksum(handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118


def _record(digest: str) -> Path:
    return cache_path() / "sums" / f"{digest}.json"


def _kept(sums: Sums) -> str:
    """Store checksums in the cache under their digest, which is returned."""
    cache_dir("sums")
    digest = digest_of(sums)
    _write(_record(digest), sums)
    return digest


def _write(path: Path, sums: Sums) -> None:
    write_atomic(path, msgspec.json.encode(_Record(dict(sums))))


def _read(path: Path, folder: Path) -> Sums | None:
    if not path.is_file():
        return None
    mend = again(folder)
    raw = read_bytes(path, ModelError, try_=mend)
    return decoded(raw, _Record, f"{path} cannot be read", ModelError, try_=mend).tensors


_SEAL, _CONFIG, ADAPTER_CONFIG = "sha256", "config_sha256", "adapter_config.json"
_WRITTEN_BY_ALL = "format"
"""Metadata key that safetensors readers expect, whoever wrote the file."""


class Held(NamedTuple):
    """What a file holds of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sums: tuple[int, int]
    """`qdist.runtime.formats.checksum` of its bytes."""


def sealed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with these tensors, including a digest of both."""
    return sealed_by_sums(_held(tensors), metadata)


def sealed_by_sums(held: Mapping[str, Held], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sealed` for tensors that are not in memory."""
    return {**metadata, _SEAL: _digest(held, metadata)}


def is_intact(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file matches its digest; True for one without a digest, from an older qdist or other software.

    metadata: its own.
    """
    return is_intact_by_sums(_held(tensors), metadata)


def is_intact_by_sums(held: Mapping[str, Held], metadata: Mapping[str, str]) -> bool:
    """`is_intact` for tensors that are not in memory."""
    return _SEAL not in metadata or metadata[_SEAL] == _digest(held, metadata)


def config_seal(config: str) -> dict[str, str]:
    """A digest of the adapter_config.json next to an adapter's file, ignoring the base's name, which users change."""
    return _seal_of(json.loads(config))


def _seal_of(config: Mapping[str, object]) -> dict[str, str]:
    said = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    return {_CONFIG: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def require_adapter(folder: Path, *, run: Path | None = None) -> None:
    """Raise RunError if an adapter folder has changed since it was gathered. run: where to gather it again from."""
    gather = command("gather", run or folder.parent)
    with opened(folder / ADAPTER) as handle:
        metadata: dict[str, str] = handle.metadata() or {}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle is not a dict)
    if not is_intact(tensors, metadata):
        raise RunError(f"{folder / ADAPTER} does not hold the tensors that were gathered", try_=gather)
    found = _seal_of(read_object(folder / ADAPTER_CONFIG, RunError, try_=gather))
    if metadata.get(_CONFIG, found[_CONFIG]) != found[_CONFIG]:
        raise RunError(f"{folder / ADAPTER_CONFIG} does not say what was gathered", try_=gather)


def _held(tensors: Mapping[str, torch.Tensor]) -> dict[str, Held]:
    return {name: Held(own.dtype, tuple(own.shape), tensor_checksum(own)) for name, own in tensors.items()}


def _digest(tensors: Mapping[str, Held], metadata: Mapping[str, str]) -> str:
    said = sorted((key, value) for key, value in metadata.items() if key not in (_SEAL, _WRITTEN_BY_ALL))
    held = [(name, str(own.dtype), list(own.shape), own.sums) for name, own in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([said, held]).encode()).hexdigest()
