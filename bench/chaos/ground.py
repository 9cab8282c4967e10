"""The ground that the suite stands on: a tiny model and data in a folder of their own, commands over them, a table."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qdist.core.model.gptq import Gptq, Shape
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import save_data, save_model

SETTINGS = {"seq_len": "32", "global_batch": "4", "micro_batch": "1", "lora.r": "4", "optim.lr": "1e-2", "steps": "4"}
"""Of a run that takes a moment."""
ROOT = Path(__file__).parents[2]


class Ground(NamedTuple):
    """A folder with models, data and a cache, none of which anything else uses."""

    folder: Path

    @property
    def model(self) -> Path:
        """A Llama of two narrow layers, with tokenizer and weights; made where it is not there."""
        return self._made("model", save_model)

    @property
    def padded(self) -> Path:
        """The same model with a tokenizer that has a pad, so that no row is added: stages of a split train none."""
        return self._made("padded", lambda place: save_model(place, tokenizer=padded()))

    @property
    def gptq(self) -> Path:
        """The same as a GPTQ checkpoint of 4 bits, groups of 32."""
        return self._made("gptq", lambda place: save_gptq(place, Gptq(shape=Shape(4, 32)), tokenizer=padded()))

    @property
    def data(self) -> Path:
        """Forty questions and short answers."""
        return self._made("data.jsonl", save_data)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / name
        if not place.exists():
            make(place)
        return place

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's, with the ground's own cache, one thread a process, and `more`."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        ours = {"QDIST_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200"}
        return {**os.environ, **ours, **(more or {})}

    def launch(self, run: Path, *flags: str, settings: Mapping[str, str] | None = None) -> list[str]:
        """The command of a run over model and data, unless the flags name others."""
        command = qdist("launch", *flags, "--run", str(run))
        if "--model" not in flags:
            command += ["--model", str(self.model)]
        if "--data" not in flags and "--load-format" not in flags:
            command += ["--data", str(self.data)]
        return command + [f"--set={key}={value}" for key, value in {**SETTINGS, **(settings or {})}.items()]


def qdist(*arguments: str) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "qdist", *arguments]


def over_a_run(run: Path, model: Path, data: Path, out: Path) -> dict[str, list[str]]:
    """Twelve commands over a finished run and its model, by name."""
    return {
        "launch": qdist("launch", "--model", str(model), "--data", str(data), "--gpus", "1", "--run", str(out / "run"),
                        *(f"--set={key}={value}" for key, value in SETTINGS.items())),
        "launch --dry-run": qdist("launch", "--model", str(model), "--data", str(data), "--gpus", "1", "--dry-run",
                                  "--run", str(out / "dry")),
        "launch --resume": qdist("launch", "--resume", "--run", str(run)),
        "quantize": qdist("quantize", str(model), "--out", str(out / "packed")),
        "quantize gptq": qdist("quantize", str(model), "--method", "gptq", "--data", str(data), "--group-size", "32",
                               "--samples", "4", "--out", str(out / "made")),
        "gather": qdist("gather", str(run), "--out", str(out / "adapter")),
        "merge": qdist("merge", str(run), "--out", str(out / "merged")),
        "export": qdist("export", str(run), "--to", "16bit", "--out", str(out / "export")),
        "generate": qdist("generate", str(run), "--prompts", str(data), "--max-new-tokens", "2",
                          "--out", str(out / "answers.jsonl")),
        "monitor": qdist("monitor", str(run), "--once"),
        "report": qdist("report", str(run), "--out", str(out / "report.html")),
        "doctor": qdist("doctor"),
    }  # fmt: skip


def finished(ground: Ground, name: str = "finished") -> Path:
    """A finished run over the ground's model and data."""
    run = ground.folder / name
    if not (run / "result.json").exists():
        subprocess.run(
            ground.launch(run, "--gpus", "1"), env=ground.environment(), check=True, stdout=subprocess.DEVNULL
        )
    return run


def processes(words: str) -> dict[int, str]:
    """Command lines of the living processes that hold `words` there or in their environment, this one's left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line, variables = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
            except OSError:
                continue
            if line and words.encode() in line + b"\0" + variables:  # a zombie has neither
                found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def left(words: str, within_s: float) -> dict[int, str]:
    """Those of `processes` that are still there after a while; at once where there are none."""
    end = time.monotonic() + within_s
    while (found := processes(words)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def has_traceback(done: "subprocess.CompletedProcess[str]") -> bool:
    """Whether a command showed its user the inside of Python."""
    return "Traceback (most recent call last)" in (done.stdout or "") + (done.stderr or "")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns, each as wide as its widest cell."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
