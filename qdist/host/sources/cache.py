"""Where the cache keeps what a launch makes from a model and its data, and what earlier launches made."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from qdist.core.errors import MachineError, RunError
from qdist.core.model.storage import FORMAT, Packing
from qdist.core.planning.plan import DataFacts, Prepared, digest
from qdist.core.spec.run_spec import RunSpec, flatten
from qdist.host.data.chat_templates import find_template
from qdist.host.data.sources import digests_of
from qdist.host.files import cache_dir, cache_path, write_atomic
from qdist.host.machine import probe
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER

WEIGHTS = (".safetensors", ".bin")
BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""Suffixes of the files that accompany weights: tokenizer, chat template, generation settings, the model's own code."""
_CONVERSION = 2
"""Increment whenever the same GGUF file would convert to a different folder."""
_EXPORT = 1
"""Increment whenever the same run would be exported to a different GGUF file."""
_DECIDING = (
    "model", "trust_remote_code", "method", "bits", "format", "load_format", "seq_len", "seed", "new_tokens", "quant.",
    "lora.targets", "lora.pool", "train.held_out", "train.train_on_source", "data.",
)  # fmt: skip
"""Settings that affect preparation."""
_COUNTED = ("global_batch", "steps", "epochs")
"""Settings that beside those affect what preparation says of the fullest micro-batches."""
CHECKSUMS = "checksums.json"
"""File in a folder written by qdist that holds its tensors' checksums."""


def converted_folder(file: Path) -> Path:
    """The folder that a GGUF file converts to, which need not exist. Reads the whole file, once."""
    return _converted_folder(file, remembered_of("file", [file], lambda: _file_digest(file)))


def known_converted_folder(file: Path) -> Path | None:
    """The same for a file read before and unchanged since; None for others. Reads and writes next to nothing."""
    known = recalled_of("file", [file])
    return _converted_folder(file, known) if known else None


def _converted_folder(file: Path, contents: str) -> Path:
    identity = f"{_CONVERSION} {file.name} {contents}"
    return cache_path() / "models" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _file_digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remembered_of(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """A value computed from files' contents, cached by their paths, sizes, times and inodes.

    what: names the computation. A cache that cannot be written forgets it.
    """
    known = recalled_of(what, files)
    if known:
        return known
    place = _known_file(what, files)
    found = compute()
    if place == _known_file(what, files):  # nobody wrote to them meanwhile
        with contextlib.suppress(OSError, MachineError):
            cache_dir(place.parent.name)
            write_atomic(place, found)
    return found


def recalled_of(what: str, files: Sequence[Path]) -> str:
    """What `remembered_of` computed for these unchanged files; empty if it did not."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _known_file(what, files).read_text()
    return ""


def _known_file(what: str, files: Sequence[Path]) -> Path:
    status = [(str(file.resolve()), file.stat()) for file in files]
    parts = [what, *([path, own.st_size, own.st_mtime_ns, own.st_ino] for path, own in status)]
    return cache_path() / "known" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def exported_file(run: RunDir, kind: str) -> Path:
    """The GGUF file of a run's merged model that an engine reads, which need not exist.

    kind: its type. Reads the adapter, once.
    """
    adapter = run.adapter / ADAPTER
    contents = remembered_of("file", [adapter], lambda: _file_digest(adapter))
    identity = f"{_EXPORT} {digest(run.plan())} {contents}"
    stem = f"{run.path.resolve().name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return cache_path() / "gguf" / f"{stem}-{kind}.gguf"


def packed_folder(folder: Path, packing: Packing, *, name: str) -> Path:
    """The folder that a model is packed to, which need not exist. name: what the user calls the model."""
    stem = re.sub(r"[^\w.-]+", "-", Path(name).name.removesuffix(".gguf")).lower()
    return cache_path() / "packed" / f"{stem}-{packing.method}-{source_identity(folder, packing)[:16]}"


def work_folder(out: Path) -> Path:
    """Where a packed folder is built before it is complete; it survives a kill."""
    return out.with_name(f".{out.name}.packing")


def source_identity(folder: Path, packing: Packing) -> str:
    """SHA-256 of what determines the packed bytes: the folder's files by name, size and time, and the packing."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in (*WEIGHTS, *BESIDE) and not path.name.startswith(".")
    ]
    contents = [FORMAT, str(folder.resolve()), files, msgspec.to_builtins(packing)]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def remembered(spec: RunSpec, folder: Path, *, to_the_letter: bool = False) -> Prepared | None:
    """What an earlier launch prepared from the same model and data, if all of it still exists.

    to_the_letter: only what preparing would give again; otherwise the fullest micro-batches may be of another number of
    steps or another global batch, which is good enough for an estimate.
    """
    try:
        prepared = read_typed(_record(spec, folder, to_the_letter=to_the_letter), Prepared, RunError)
    except RunError:
        return None
    return prepared if all_there(prepared) else None


def remember(spec: RunSpec, prepared: Prepared) -> None:
    """Store what was prepared for `remembered`, with those notes that also hold for the next launch."""
    lasting = tuple(note for note in prepared.notes if not note.startswith("packed "))
    content = msgspec.json.encode(msgspec.structs.replace(prepared, notes=lasting))
    for to_the_letter in (False, True):
        path = _record(spec, Path(prepared.source.path), to_the_letter=to_the_letter)
        cache_dir(path.parent.name)
        write_atomic(path, content)


def all_there(prepared: Prepared) -> bool:
    """Whether everything that a run reads still exists."""
    source, data = prepared.source, prepared.data
    paths = (source.path, source.packed, source.tokenizer, data.path if data else "")
    return all(os.path.exists(path) for path in paths if path)


def _record(spec: RunSpec, folder: Path, *, to_the_letter: bool) -> Path:
    """The file that records what is prepared from a model's folder, named by all that determines it."""
    versions, deciding = probe.versions(), (*_DECIDING, *(_COUNTED if to_the_letter else ()))
    parts = [
        [versions.get(name) for name in ("qdist", "transformers", "bitsandbytes")],
        tuple(field.name for field in msgspec.structs.fields(DataFacts)),  # of a qdist that prepares less, or more
        source_identity(folder, Packing(bits=16)),
        digests_of(spec.data),
        {key: value for key, value in flatten(spec).items() if key.startswith(deciding)},
        find_template(spec.data.template) if spec.data.template else None,
    ]
    key = hashlib.sha256(json.dumps(parts, default=msgspec.to_builtins).encode()).hexdigest()
    return cache_path() / "prepared" / f"{key[:32]}.json"
