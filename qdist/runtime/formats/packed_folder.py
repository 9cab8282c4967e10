"""A folder of packed weights: one file per decoder layer and one for the rest, an index, `qdist.json`.

config.json                         with transformers' `quantization_config`
model-00001-of-00031.safetensors    decoder layer 0, ..., the last file holds everything outside the layers
model.safetensors.index.json        which tensor is in which file
qdist.json                          a `Manifest`: where it came from, and a checksum of each tensor
tokenizer and generation files      as the source has them
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import torch

from qdist.core.errors import ModelError
from qdist.core.model.storage import FORMAT, Packing
from qdist.host.files import sync, write_atomic
from qdist.host.opening import converted, read_object, read_typed, require_file, told
from qdist.host.progress import ProgressLine
from qdist.host.sources.model_folder import INDEX, weight_map
from qdist.host.terminal import say
from qdist.runtime.formats.checksum import Sums, require_sums, tensor_checksum

MANIFEST = "qdist.json"
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of types."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of `qdist.json`."""

    format: int = FORMAT
    packing: Packing
    source: str
    """The folder that was packed."""
    source_identity: str
    """SHA-256 of its files' names, sizes and times, and of the packing."""
    source_fingerprint: str = ""
    """Fingerprint of its weights, independent of their path; empty if written by a qdist that recorded none."""
    layers: int
    bytes: int
    """Bytes of all tensors."""
    files: dict[str, int]
    """Bytes of each file of tensors."""
    checksums: dict[str, tuple[int, int]]
    """`qdist.runtime.formats.checksum` of the bytes of each tensor."""
    versions: dict[str, str]
    note: str = ""
    """What other programs cannot read in the folder; empty if they read all of it."""


class Entry(NamedTuple):
    """A tensor that is created when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class Written(msgspec.Struct, frozen=True):
    """A finished file."""

    bytes: int
    tensor_bytes: int
    checksums: dict[str, tuple[int, int]]


def entries_of(tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    """Entries for existing tensors."""
    return [
        Entry(name, value.dtype, tuple(value.shape), partial(torch.Tensor.detach, value))
        for name, value in tensors.items()
    ]


def stored_entries(folder: Path, file: str, sums: Sums | None = None) -> list[Entry]:
    """The tensors of a file, each read when it is written. sums: see `read_tensor`."""
    kinds = {name: dtype for dtype, name in NAMES.items()}
    with opened(folder / file) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (a handle is not a dict)
        return [
            Entry(
                name, kinds[part.get_dtype()], tuple(part.get_shape()), partial(read_tensor, folder / file, name, sums)
            )
            for name, part in parts.items()
        ]


def read_tensor(file: Path, name: str, sums: Sums | None = None) -> torch.Tensor:
    """One tensor of a file. Raises ModelError if it does not match `sums`."""
    # Opened anew each time: the pages of a mapping that stays open count as memory of this process.
    with opened(file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return require_sums(file, name, tensor, sums)


def file_name(position: int, layers: int) -> str:
    """Name of the file of decoder layer `position`, or of everything else if `position == layers`."""
    return f"model-{position + 1:05d}-of-{layers + 1:05d}.safetensors"


def finished(folder: Path, name: str) -> Written | None:
    """What an earlier process finished writing, or None."""
    record = folder / f".{name}.json"
    if not record.is_file():
        return None
    try:
        written = read_typed(record, Written, ModelError)
    except ModelError:
        return None
    return written if (folder / name).is_file() and (folder / name).stat().st_size == written.bytes else None


def write_missing(folder: Path, files: Collection[str], entries: Callable[[str], list[Entry]]) -> dict[str, Written]:
    """Write the tensor files that an earlier process has not finished, reporting progress.

    entries: what is in a file.
    """
    written = {file: there for file in files if (there := finished(folder, file))}
    if written:
        say(f"{len(written)} of {len(files)} files are there already", err=True)
    missing = {file: entries(file) for file in files if file not in written}
    done = sum(there.tensor_bytes for there in written.values())
    total = done + sum(entry.bytes for own in missing.values() for entry in own)
    with ProgressLine(total, "written", done=done, in_bytes=True) as progress:
        for file, own in missing.items():
            written[file] = write_tensors(folder, file, own, wrote=progress.advance)
    return written


def write_tensors(
    folder: Path,
    name: str,
    entries: Iterable[Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[int], None] | None = None,
) -> Written:
    """Write a safetensors file, one tensor in memory at a time, and a record next to it once it is complete.

    wrote: called with the bytes of each tensor.
    """
    beside = folder / f".{name}.unfinished"
    with open(beside, "wb") as file:
        written = write_safetensors(file, entries, metadata=metadata, wrote=wrote)
    sync(beside)
    os.replace(beside, folder / name)
    write_atomic(folder / f".{name}.json", msgspec.json.encode(written))
    return written


def write_safetensors(
    file: BinaryIO,
    entries: Iterable[Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    wrote: Callable[[int], None] | None = None,
) -> Written:
    """Write the bytes of a safetensors file, one tensor in memory at a time.

    safetensors' own `save_file` first copies every tensor into memory, puts metadata in an order of chance, and writes
    into a file of a name of its own beside, which a kill leaves there.
    """
    ordered = in_order(entries)
    header, checksums = header_of(ordered, {"format": "pt", **(metadata or {})}), {}
    file.write(header)
    for entry in ordered:
        value = entry.make().detach().to("cpu", entry.dtype).contiguous()
        if tuple(value.shape) != entry.shape:
            raise ModelError(f"{entry.name} has shape {list(value.shape)}, not {list(entry.shape)}")
        checksums[entry.name] = tensor_checksum(value)
        file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        if wrote:
            wrote(entry.bytes)
    tensor_bytes = sum(entry.bytes for entry in ordered)
    return Written(len(header) + tensor_bytes, tensor_bytes, checksums)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which a file has its tensors: those of wide types first, so that each begins at a multiple."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """safetensors' header of tensors in this order.

    It is its length in 8 bytes, then JSON padded with spaces to a multiple of 8 bytes.
    """
    table: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for entry in entries:
        offsets = [start, start + entry.bytes]
        table[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        start += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, files: Mapping[str, Written]) -> None:
    """Write the index of which tensor is in which file, as transformers reads it."""
    weight_map = {name: file for file, written in files.items() for name in written.checksums}
    total = sum(written.tensor_bytes for written in files.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def finish(folder: Path, written: Mapping[str, Written], manifest: Manifest) -> None:
    """Write index and manifest, and remove the records of finished files."""
    write_index(folder, written)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    for name in written:
        (folder / f".{name}.json").unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> Manifest | None:
    """What qdist recorded about a folder, or None if it is not one of qdist's.

    Raises ModelError for a manifest of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    again = "pack the model again"
    content = read_object(path, ModelError, try_=again)
    found = content.get("format")
    if found == FORMAT:
        return converted(content, Manifest, str(path), ModelError, try_=again)
    raise ModelError(f"{folder} has packing format {found}, this qdist reads {FORMAT}", try_="pack the model again")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file, whose pages are released at the end. Raises ModelError if it is incomplete."""
    from safetensors import safe_open

    again = "download or pack the model again"
    require_file(file, ModelError, try_=again)
    with told(str(file), ModelError, try_=again), safe_open(file, framework="pt") as handle:
        yield handle


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor in a folder of safetensors; empty if there are none."""
    indexed = weight_map(folder)
    if indexed is not None:
        return indexed
    names: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as handle:
            names.update(dict.fromkeys(handle.keys(), file.name))
    return names
