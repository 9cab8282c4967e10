"""Runs one of qdist's torch-side modules in a process of its own, with its errors as our errors."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qdist.core import errors
from qdist.core.plan import Prepared
from qdist.core.render import PASSIVE
from qdist.core.spec import RunSpec
from qdist.host import children, probe


def prepare(spec: RunSpec) -> Prepared:
    """Convert, repair and tokenize in a separate process, so that the launcher stays free of torch.

    Raises whatever QdistError the process ended with.
    """
    with tempfile.TemporaryDirectory(prefix="qdist-") as folder:
        given, wanted = Path(folder, "spec.json"), Path(folder, "prepared.json")
        given.write_bytes(msgspec.json.encode(spec))
        code = run_module("qdist.runtime.prepare", (str(given), str(wanted)))
        error = wanted.with_suffix(".error")
        if error.is_file():
            record = json.loads(error.read_text())
            raise getattr(errors, record["kind"])(record["message"], try_=record["try"])
        if code:
            raise errors.JobError(f"preparing model and data ended with exit code {code}", try_="the traceback above")
        return msgspec.json.decode(wanted.read_bytes(), type=Prepared)


def run_module(module: str, arguments: Sequence[str], *, asks: bool = False) -> int:
    """Run a module's `main` in a process of its own, on this terminal; its exit code.

    asks: it reads what is typed.
    Raises KeyboardInterrupt once it has ended by Ctrl-C, JobError when a signal killed it.
    """
    environment = dict(os.environ)
    if probe.cluster().device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, once imported, warns that it found no GPU
        environment.setdefault("OMP_WAIT_POLICY", PASSIVE)
    return children.run([sys.executable, "-m", "qdist.runtime.child", module, *arguments], environment, asks=asks)
