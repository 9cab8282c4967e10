"""Finds or creates the packed form of a model."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from qdist.core.errors import ModelError, RunError
from qdist.core.model.storage import Packing, quantized_as
from qdist.core.requests import Pack
from qdist.core.text import command, format_bytes, format_duration, quoted
from qdist.host.files import cache_dir, locked
from qdist.host.sources import cache
from qdist.host.sources.model_folder import fingerprint
from qdist.host.sources.models import locate, read_json
from qdist.host.terminal import say
from qdist.runtime.formats.packed_folder import Manifest, read_manifest
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.materialize import materialize, trust
from qdist.runtime.quantize.pack import pack
from qdist.runtime.quantize.source import check_packed
from qdist.runtime.quantize.tensors import streamed


class Packed(NamedTuple):
    """A folder that ranks read, and notes about it for the user."""

    folder: Path
    note: str = ""


def packed_folder(folder: Path, packing: Packing, *, name: str) -> Packed:
    """The folder with a model packed as requested: its own, one from the cache, or one packed now.

    folder: a materialized model. name: what the user calls it.
    Raises ModelError when it is packed otherwise already, PlanError when the disk is too small.
    """
    there = _already(folder, name)
    if there is not None:
        _require_same(name, there, packing)
        check_packed(folder, blueprint(folder), there)
        return Packed(folder)
    if packing.bits == 16 and (tensors := streamed(folder, blueprint(folder))) and tensors.canonical:
        return Packed(folder)
    out = cache.packed_folder(folder, packing, name=name)
    if out.is_dir():
        return _packed_before(out, folder)
    with _alone(out, name):
        if out.is_dir():
            return _packed_before(out, folder)
        began = time.monotonic()
        manifest = pack(folder, out, packing, name=name)
    took = format_duration(time.monotonic() - began)
    return Packed(out, f"packed {name} to {packing}, once: {format_bytes(manifest.bytes)} in {took}")


def _packed_before(out: Path, folder: Path) -> Packed:
    """The existing packed folder. Raises ModelError if it was made from other weights of the same sizes and times."""
    manifest = read_manifest(out)
    if manifest is not None and manifest.source_fingerprint not in ("", fingerprint(folder)):
        raise ModelError(
            f"{out} was packed when {folder} held other weights, in files of the same sizes and times",
            try_=f"{quoted('rm', '-r', out)}: it is packed again",
        )
    return Packed(out)


def quantize(model: str, out: Path, packing: Packing) -> Manifest:
    """Write a packed model to a user's folder. Raises RunError if something exists there already."""
    folder = materialize(locate(model))
    there = _already(folder, model)
    if there is not None:
        raise ModelError(f"{model} is packed to {there} already", try_=command("launch", "--model", model))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out, model):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if os.path.lexists(out):
            raise RunError(f"{out} exists", try_="another --out")
        return pack(folder, out, packing, name=model)


def _already(folder: Path, name: str) -> Packing | None:
    """How the model is already packed, or None. A folder without config.json is refused where it is read."""
    config = folder / "config.json"
    return quantized_as(read_json(config), name=name) if config.is_file() else None


def _require_same(name: str, there: Packing, wanted: Packing) -> None:
    if (there.bits, there.type, there.double) == (wanted.bits, wanted.type, wanted.double):
        return
    flags = f"--bits {there.bits}"
    if there.bits == 4:
        flags += f" --set quant.type={there.type} --set quant.double={str(there.double).lower()}"
    raise ModelError(
        f"{name} is packed to {there} ({there.bits} bits); this run wants {wanted} ({wanted.bits} bits)",
        try_=f"{flags}, or the model it was packed from",
    )


@contextmanager
def _alone(out: Path, name: str) -> Iterator[None]:
    """A lock so that one process at a time packs to a folder; others wait, and say so."""
    lock = cache_dir("packed") / f".{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, busy=f"{out} is being packed"))
        except RunError:
            say(f"waiting: another process is packing {name}", err=True)
            stack.enter_context(locked(lock))
        yield


def run(request: Pack) -> None:
    """Pack a model, and report the result and how to use it."""
    packing, out = request.packing, Path(request.out)
    if request.trust_remote_code:
        trust(request.model)
    began = time.monotonic()
    manifest = quantize(request.model, out, packing)
    took = format_duration(time.monotonic() - began)
    say(f"{out}: {packing}, {manifest.layers} layers, {format_bytes(manifest.bytes)}, {took}")
    if manifest.note:
        say(f"note  {manifest.note}")
    say(f"use it  {command('launch', '--model', out, *_flags(packing), '--data', 'FILE')}")


def _flags(packing: Packing) -> list[str]:
    """Flags that a run on such a backbone needs, where they differ from the defaults."""
    flags = ["--bits", str(packing.bits)]
    if packing.bits == 4 and packing.type != "nf4":
        flags += ["--set", f"quant.type={packing.type}"]
    if packing.bits == 4 and not packing.double:
        flags += ["--set", "quant.double=false"]
    return flags
