"""Where in the cache is what a launch makes of a model: a converted GGUF file, packed weights?"""

import hashlib
import json
import re
from pathlib import Path

import msgspec

from qdist.core.packing import FORMAT, Packing
from qdist.host.files import cache_path

WEIGHTS = (".safetensors", ".bin")
BESIDE = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that make weights a model: tokenizer, chat template, generation settings."""
_CONVERSION = 1
"""Raise it whenever the same GGUF file would become another folder."""
_HEAD_BYTES = 1 << 24
"""Of a GGUF file: metadata, tokenizer and the first tensors."""


def converted_folder(file: Path) -> Path:
    """The folder that a GGUF file becomes, which need not be there."""
    with open(file, "rb") as handle:
        head = hashlib.sha256(handle.read(_HEAD_BYTES)).hexdigest()
    identity = f"{_CONVERSION} {file.name} {file.stat().st_size} {head}"
    return cache_path() / "models" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def packed_folder(folder: Path, packing: Packing, *, name: str) -> Path:
    """The folder that a model is packed to, which need not be there. name: what the user calls the model."""
    stem = re.sub(r"[^\w.-]+", "-", Path(name).name.removesuffix(".gguf")).lower()
    return cache_path() / "packed" / f"{stem}-{packing.method}-{source_identity(folder, packing)[:16]}"


def work_folder(out: Path) -> Path:
    """Where a packed folder grows before it is there; it outlives a kill."""
    return out.with_name(f".{out.name}.packing")


def source_identity(folder: Path, packing: Packing) -> str:
    """SHA-256 of what decides the packed bytes: the folder's files by name, size and time, and the packing."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in (*WEIGHTS, *BESIDE) and not path.name.startswith(".")
    ]
    contents = [FORMAT, str(folder.resolve()), files, msgspec.to_builtins(packing)]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
