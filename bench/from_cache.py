"""From `launch` to the first step of a packed model: `python bench/from_cache.py --model llama-65b -- --gpus 4 ...`.

Packs one random decoder layer of the model's shape and writes it as often as the model has layers, so that nothing is
downloaded and every byte is on the disk; asks the kernel to forget it; launches what follows `--` on it, twice.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from gptq_speed import made

from qdist.core.model.aliases import config_of
from qdist.core.model.storage import Packing
from qdist.core.text import format_bytes
from qdist.host.sources.model_folder import INDEX
from qdist.runtime.formats.packed_folder import (
    MANIFEST,
    file_name,
    finish,
    read_manifest,
    stored_entries,
    write_tensors,
)
from qdist.runtime.quantize.pack import pack


def main() -> None:
    """Print the disk's read rate, and what each launch says at its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-65b")
    parser.add_argument("--work", type=Path)
    parser.add_argument("flags", nargs="*", help="of `qdist launch`, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        folder = Path(name)
        began = time.monotonic()
        deep(folder, given.model)
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"{format_bytes(size)} written in {time.monotonic() - began:.0f} s", flush=True)
        print(f"the disk reads {forget_and_read(folder / 'model') / 1e9:.1f} GB/s", flush=True)
        text = folder / "data.json"
        text.write_text(json.dumps([{"instruction": "say it", "output": "abcdefgh" * 80}] * 400))
        for cold in (True, False):
            if cold:
                forget(folder / "model")
            run = folder / f"run-{cold}"
            command = [sys.executable, "-m", "qdist", "launch", "--model", str(folder / "model"), "--data", str(text)]
            subprocess.run([*command, "--run", str(run), *given.flags], check=True, stdout=subprocess.DEVNULL)
            result = json.loads((run / "result.json").read_text())
            kept = {key: result[key] for key in ("start_seconds", "starting", "loading", "held")}
            loads = [peak["load"] for of_rank in result["peaks"] for peak in of_rank]
            print("nothing in memory:" if cold else "in the page cache:", json.dumps(kept), "load", loads, flush=True)


def deep(folder: Path, model: str) -> None:
    """`folder`/model: all layers alike."""
    made(folder / "one", model, 1)
    packing = Packing(bits=4, dtype="bfloat16")
    pack(folder / "one", folder / "packed", packing, name=model)
    shutil.rmtree(folder / "one")
    manifest = read_manifest(folder / "packed")
    assert manifest is not None
    layers, work = config_of(model)["num_hidden_layers"], folder / "model"
    shutil.copytree(folder / "packed", work, ignore=shutil.ignore_patterns("*.safetensors", MANIFEST, INDEX))
    config = json.loads((work / "config.json").read_text())
    (work / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    written = {}
    for position in range(layers + 1):
        file = file_name(position, layers)
        entries = stored_entries(folder / "packed", file_name(min(1, position // layers), 1))
        renamed = [entry._replace(name=entry.name.replace(".layers.0.", f".layers.{position}.")) for entry in entries]
        written[file] = write_tensors(work, file, renamed)
    finish(
        work,
        written,
        msgspec.structs.replace(
            manifest,
            layers=layers,
            bytes=sum(part.tensor_bytes for part in written.values()),
            files={file: part.bytes for file, part in written.items()},
            checksums={name: sums for part in written.values() for name, sums in part.checksums.items()},
        ),
    )


def forget(folder: Path) -> None:
    """Have the kernel drop the files' pages."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def forget_and_read(folder: Path) -> float:
    """Bytes a second of reading a few files in order."""
    forget(folder)
    files = sorted(folder.glob("*.safetensors"))[:8]
    began, count = time.monotonic(), 0
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while chunk := len(stream.read(1 << 24)):
                count += chunk
    return count / (time.monotonic() - began)


if __name__ == "__main__":
    main()
