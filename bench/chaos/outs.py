"""Every command that has --out, at every kind of thing that --out may be.

    python -m bench.chaos.outs --count 200

As root (for private device nodes and a small disk; what cannot be made is left out). A device or pipe must still be one
afterwards, a link must still be a link, and no command may end with a traceback, with code 0 where it wrote nothing, or
with another code than 0, 1 and 2. `--count` commands at most, `--seed` orders them. Exit code 1 where one fails. About
8 minutes for all of them.
"""

import argparse
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from bench.chaos.ground import Ground, has_traceback, qdist, table

_MOST_S = 180


class Place(NamedTuple):
    """Something that --out may name."""

    name: str
    make: Callable[[Path], Path]
    """In a folder of its own; the path to give."""


def _device(minor: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.mknod(folder / "node.gguf", stat.S_IFCHR | 0o666, os.makedev(1, minor))
        return folder / "node.gguf"

    return make


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "node.gguf")
    return folder / "node.gguf"


def _link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "file.gguf").write_text("kept")
        (folder / "folder.gguf").mkdir()
        (folder / "link.gguf").symlink_to(target)
        return folder / "link.gguf"

    return make


def _file(folder: Path) -> Path:
    (folder / "file.gguf").write_text("kept")
    return folder / "file.gguf"


def _empty(folder: Path) -> Path:
    (folder / "folder.gguf").mkdir()
    return folder / "folder.gguf"


def _used(folder: Path) -> Path:
    (_empty(folder) / "kept").write_text("kept")
    return folder / "folder.gguf"


def _full_disk(folder: Path) -> Path:
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder / "disk"], check=True, capture_output=True)
    (folder / "disk" / "full").write_bytes(b"x" * 4096)
    return folder / "disk" / "out.gguf"


PLACES = (
    Place("nothing", lambda folder: folder / "out.gguf"),
    Place("a missing folder", lambda folder: folder / "one" / "two" / "out.gguf"),
    Place("a name with a dash", lambda folder: Path("-out.gguf")),
    Place("null device", _device(3)),
    Place("full device", _device(7)),
    Place("pipe", _pipe),
    Place("dangling link", _link("nowhere.gguf")),
    Place("link to a file", _link("file.gguf")),
    Place("link to a folder", _link("folder.gguf")),
    Place("link to itself", _link("link.gguf")),
    Place("file", _file),
    Place("empty folder", _empty),
    Place("used folder", _used),
    Place("below a file", lambda folder: _file(folder) / "out.gguf"),
    Place("read-only", lambda folder: Path("/sys/qdist-out.gguf")),
    Place("full disk", _full_disk),
)


def commands(ground: Ground, run: Path, exact: Path, sparsebit: Path) -> dict[str, list[str]]:
    """Name -> the command without --out."""
    prompts = ground.folder / "prompts.txt"
    prompts.write_text("hello\n")
    return {
        "report": ["report", str(run)],
        "metrics": ["metrics", str(run)],
        "generate": ["generate", str(run), "--prompts", str(prompts), "--max-new-tokens", "2"],
        "gather": ["gather", str(run)],
        "merge": ["merge", str(run)],
        "merge exactly": ["merge", str(exact)],
        "export 16bit": ["export", "--to", "16bit", str(run)],
        "export gguf": ["export", "--to", "gguf", str(run)],
        "export gptq": ["export", "--to", "gptq", "--samples", "2", str(run)],
        "export lora": ["export", "--to", "lora", str(exact)],
        "export zeros": ["export", "--to", "zeros", "--lossy", str(exact)],
        "quantize": ["quantize", str(ground.model)],
        "quantize gptq": [
            "quantize", str(ground.model), "--method", "gptq", "--data", str(ground.data), "--samples", "2",
            "--group-size", "32",
        ],
        "convert": ["convert", "--from", "sparsebit", "--config", str(ground.folder / "config"), str(sparsebit)],
    }  # fmt: skip


def trial(ground: Ground, words: list[str], place: Place, folder: Path) -> str:
    """One command; what it did wrong, or nothing. Raises OSError where the place cannot be made."""
    folder.mkdir(parents=True)
    out = place.make(folder)
    seen = folder / out if not out.is_absolute() else out
    before = _kinds(folder)
    with _drained(seen):
        done = subprocess.run(
            qdist(*words, f"--out={out}"), cwd=folder, env=ground.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_MOST_S,
        )  # fmt: skip
    after = _kinds(folder)
    rewrites = words[0] in ("report", "metrics")  # a file of that name, and nothing else
    gone = [name for name, kind in before.items() if after.get(name, (0, None))[: 2 - rewrites] != kind[: 2 - rewrites]]
    litter = [name for name in after if name.startswith(".") and "unfinished" not in name]
    last = (done.stderr.strip().splitlines() or ["no word"])[-1][:90]
    return "; ".join(filter(None, (
        f"traceback: {last}" if has_traceback(done) else "",
        f"code {done.returncode}: {last}" if done.returncode not in (0, 1, 2) else "",
        f"replaced {', '.join(gone)}" if gone else "",
        f"left {', '.join(litter)}" if litter else "",
        "nothing written" if done.returncode == 0 and not os.path.exists(seen) else "",
        f"refused: {done.stderr.strip()[:90]}" if place.name == "nothing" and done.returncode else "",
        "code 0 on a full device" if place.name in ("full device", "full disk") and not done.returncode else "",
    )))  # fmt: skip


def _kinds(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """What lies in a folder, by name: its kind, and of a file that was there its content."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for path in folder.iterdir():
        mode = stat.S_IFMT(path.lstat().st_mode)
        found[path.name] = (mode, path.read_bytes() if stat.S_ISREG(mode) and path.stat().st_size < 100 else None)
    return found


@contextmanager
def _drained(path: Path) -> Iterator[None]:
    """Somebody reads a pipe, from now until the command has ended."""
    if not path.is_fifo():
        yield
        return
    descriptor = os.open(path, os.O_RDWR)
    reader = threading.Thread(target=lambda: os.read(descriptor, 1 << 20), daemon=True)
    reader.start()
    yield
    os.write(descriptor, b"end")
    reader.join()
    os.close(descriptor)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="Commands whose name holds this.", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ground = Ground(Path(temporary) / "ground")
        run, exact = ground.folder / "run", ground.folder / "exact"
        qa = ("--model", str(ground.gptq), "--method", "qa-lora", "--bits", "4")
        for command in (ground.launch(run), ground.launch(exact, *qa)):
            subprocess.run(command, env=ground.environment(), check=True, capture_output=True)
        known = commands(ground, run, exact, _sparsebit(ground.folder))
        pairs = [(name, place) for name in known for place in PLACES if given.only in name]
        Random(given.seed).shuffle(pairs)
        rows, left_out = [], 0
        for number, (name, place) in enumerate(pairs[: given.count]):
            folder = Path(temporary) / f"trial{number}"
            try:
                wrong = trial(ground, known[name], place, folder)
            except (PermissionError, subprocess.CalledProcessError):
                left_out += 1
                continue
            except subprocess.TimeoutExpired:
                wrong = "hung"
            finally:
                subprocess.run(["umount", folder / "disk"], capture_output=True, check=False)
            if wrong:
                rows.append((name, place.name, wrong))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    if rows:
        print(table(("command", "--out", "wrong"), rows))
    done = len(pairs[: given.count]) - left_out
    print(f"{done} commands, {left_out} places that could not be made: {len(rows)} wrong")
    sys.exit(bool(rows))


def _sparsebit(folder: Path) -> Path:
    import torch

    from tests.runtime.sparsebit_files import make, write_config

    write_config(folder / "config")
    torch.save(make(group_size=32).content, folder / "sparsebit.pt")
    return folder / "sparsebit.pt"


if __name__ == "__main__":
    main()
