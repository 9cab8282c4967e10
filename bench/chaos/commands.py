"""Every command that writes, over a small world of models and runs, as a function that a fork runs: what a kill meets.

The command line runs in this process; so does the process that it starts for torch, and the ranks are forks, so that
what all of them write is seen, and nothing is imported twice.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from bench.chaos.ground import SETTINGS, Ground

Run = Callable[[Path], int]
TRAINING = {**SETTINGS, "steps": "6", "train.save_steps": "2", "train.held_out": "0.1", "train.eval_steps": "2",
            "train.keep": "9", "lora.dropout": "0.1"}  # fmt: skip


class Command(NamedTuple):
    """run: in a world. again: what is typed after a kill; the same by default."""

    run: Run
    again: Run | None = None


def settled() -> None:
    """Import once what every fork needs, on one thread: a fork has no other."""
    import bitsandbytes
    import peft
    import torch
    import transformers.models.llama.modeling_llama

    from qdist.cli import main
    from qdist.runtime import tasks
    from qdist.runtime.exports import merge
    from qdist.runtime.quantize import bitsandbytes as quantize
    from qdist.runtime.quantize.gptq import make
    from qdist.runtime.train import prepare, result, worker

    assert all((bitsandbytes, peft, transformers, main, tasks, result, make, merge, prepare, quantize, worker))
    torch.set_num_threads(1)


def build(world: Path) -> int:
    """Models in every form, a finished run of each kind, one that stopped on its way; 0."""
    import torch

    from tests.runtime.sparsebit_files import make, write_config

    ground = Ground(world)
    for model in (ground.model, ground.gptq):
        assert model.is_dir()
    _ended(qdist("launch", *_training(world, "runs/nf4")))
    _ended(qdist("launch", *_training(world, "runs/qa", model=ground.gptq), "--method", "qa-lora"))
    shutil.copytree(world / "runs/nf4", world / "runs/half")
    for name in ("adapter", "checkpoints/step_000004", "checkpoints/step_000006"):
        shutil.rmtree(world / "runs/half" / name)
    (world / "runs/half/result.json").unlink()
    _ended(qdist("export", str(world / "runs/nf4"), "--to", "gguf", "--out", str(world / "other.gguf")))
    write_config(world / "sparsebit-config")
    torch.save(make().content, world / "sparsebit.pth.tar")
    shutil.copytree(ground.gptq, world / "pickled")
    _to_bin(world / "pickled")
    (world / "prompts.txt").write_text("hello there\nhow are you\nsystem\n")
    (world / "long.txt").write_text("hello there system 1 aaaa hello " * 400)
    return 0


def _to_bin(folder: Path) -> None:
    """A checkpoint in torch's own file, as older ones are."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()


def _training(world: Path, run: str, *, model: Path | None = None, **settings: str) -> list[str]:
    named = ["--model", str(model or Ground(world).model), "--data", str(Ground(world).data), "--run", str(world / run)]
    return [*named, *(f"--set={key}={value}" for key, value in {**TRAINING, **settings}.items())]


def _ended(code: int) -> None:
    if code:
        raise SystemExit(code)


def qdist(*arguments: str) -> int:
    """The command line, with all that it starts, in this process; its exit code."""
    from qdist.cli.main import main
    from qdist.host import children
    from qdist.host.launch import local

    warnings.filterwarnings("ignore", "'qdist.runtime.* found in sys.modules", RuntimeWarning)
    sys.argv = ["qdist", *arguments]
    with mock.patch.object(children, "run", _child), mock.patch.object(local.subprocess, "Popen", _started):
        return _code(main)


def _child(command: Sequence[str], *_: Any, pass_fds: Sequence[int] = (), **__: Any) -> int:
    """In place of a process of its own for a module that needs torch, with descriptors of its own too."""
    from qdist.host.tasks import ENTRY
    from qdist.runtime import tasks

    place, own = list(command).index(ENTRY), {str(number): str(os.dup(number)) for number in pass_fds}
    before, sys.argv = sys.argv, [own.get(word, word) for word in command[place:]]
    code = _code(tasks.main)
    sys.argv = before
    return code


def _code(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


_POPEN = subprocess.Popen


def _started(command: Any, *arguments: Any, **more: Any) -> Any:
    """Any program as it is, but for the one that starts the ranks of a run."""
    script = Path(command[-1]) if isinstance(command, list | tuple) else Path()
    return Ranks(script.parent) if script.name == "launch.sh" else _POPEN(command, *arguments, **more)


class Ranks:
    """In place of qdist.host.launch.agent: a fork that is the only rank."""

    def __init__(self, run: Path) -> None:
        from qdist.core.planning.plan import digest
        from qdist.host.run.rundir import RunDir

        plan = RunDir(run).plan()
        assert plan.world_size == 1
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _be_rank(run, digest(plan))

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _be_rank(run: Path, digest: str) -> None:
    """Train, and leave as a rank does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    sys.argv = ["worker", str(run), "--digest", digest]
    code = 1
    try:
        from qdist.runtime.train import worker

        code = _code(worker.main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _typed(*words: str) -> Run:
    """A command line; words that begin with @ are places in the world."""
    return lambda world: qdist(*(str(world / word[1:]) if word.startswith("@") else word for word in words))


def _launch(run: str, *more: str, model: str = "", **settings: str) -> Command:
    """A launch with a cold cache; typed again as it was, or resumed once there is a plan."""

    def first(world: Path) -> int:
        return qdist("launch", *_training(world, run, model=world / model if model else None, **settings), *more)

    def again(world: Path) -> int:
        if (world / run / "result.json").is_file():
            return 0
        resume = ("launch", "--resume", "--run", str(world / run))
        return qdist(*resume) if (world / run / "plan.json").is_file() else first(world)

    return Command(first, again)


def _lesson(world: Path) -> int:
    """What a finished run on GPUs leaves in the cache; none of this machine can be made."""
    from qdist.core.machine.calibration import CalibrationSample
    from qdist.host.run import calibration

    fields = dict.fromkeys(CalibrationSample.__struct_fields__, 1) | {
        "card": "a card", "placement": "replicate", "model": "a model", "rates": "table", "version": "1"
    }  # fmt: skip
    with contextlib.suppress(FileNotFoundError):
        (world / "cache" / calibration.FILE).unlink()
    for _ in range(2):
        calibration.append(CalibrationSample(**fields))
    return 0


def _noted(world: Path) -> int:
    """The line that a launch adds to what was typed."""
    from qdist.host.run import rundir
    from qdist.host.run.rundir import RunDir

    rundir.note(RunDir(world / "runs/nf4"), ["qdist", "launch", "again"])
    return 0


COMMANDS: dict[str, Command] = {
    "launch": _launch("runs/new"),
    "launch keeping few": _launch("runs/new", **{"train.keep": "1", "train.save_steps": "1"}),
    "launch of gptq": _launch("runs/new", "--method=gptq-lora", model="pickled"),
    "launch of gguf": _launch("runs/new", model="other.gguf", steps="2"),
    "resume": Command(_typed("launch", "--resume", "--run", "@runs/half"), None),
    "gather": Command(_typed("gather", "@runs/nf4")),
    "gather of a step": Command(_typed("gather", "@runs/nf4", "--checkpoint", "2")),
    "gather --out": Command(_typed("gather", "@runs/nf4", "--out", "@out")),
    "merge": Command(_typed("merge", "@runs/nf4", "--out", "@out")),
    "merge exactly": Command(_typed("merge", "@runs/qa", "--out", "@out")),
    "export lora": Command(_typed("export", "@runs/qa", "--to", "lora", "--out", "@out")),
    "export 16bit": Command(_typed("export", "@runs/nf4", "--to", "16bit", "--out", "@out")),
    "export gguf": Command(_typed("export", "@runs/qa", "--to", "gguf", "--out", "@out.gguf")),
    "export gptq": Command(_typed("export", "@runs/nf4", "--to", "gptq", "--out", "@out", "--samples", "4",
                                  "--group-size", "32")),
    "export zeros": Command(_typed("export", "@runs/qa", "--to", "zeros", "--lossy", "--out", "@out")),
    "quantize nf4": Command(_typed("quantize", "@model", "--out", "@out")),
    "quantize int8": Command(_typed("quantize", "@model", "--method", "int8", "--out", "@out")),
    "quantize gptq": Command(_typed("quantize", "@model", "--method", "gptq", "--out", "@out", "--data", "@long.txt",
                                    "--samples", "4", "--seq-len", "32", "--group-size", "32")),
    "quantize of gguf": Command(_typed("quantize", "@other.gguf", "--out", "@out")),
    "convert": Command(_typed("convert", "@sparsebit.pth.tar", "--from", "sparsebit", "--out", "@out", "--config",
                              "@sparsebit-config")),
    "report": Command(_typed("report", "@runs/nf4")),
    "report --out": Command(_typed("report", "@runs/nf4", "@runs/qa", "--out", "@out.html")),
    "metrics --out": Command(_typed("metrics", "@runs/nf4", "--out", "@out.prom")),
    "generate": Command(_typed("generate", "@runs/nf4", "--prompts", "@prompts.txt", "--out", "@out.jsonl",
                               "--max-new-tokens", "4", "--batch", "1")),
    "lessons": Command(_lesson),
    "commands": Command(_noted),
}  # fmt: skip
"""By name. Cache and temporary folder are those of the world."""
