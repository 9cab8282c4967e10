"""How did a launch end, if not by finishing? As an error for the user, and as a file for whoever looks later."""

import contextlib
import re
import signal
from collections import deque
from pathlib import Path

import msgspec

from qdist.core.errors import RunError
from qdist.host.files import write_atomic
from qdist.host.rundir import ENDED, Ended, RunDir


def note(run: RunDir, ended: Ended) -> None:
    """For whoever looks at the run later; a full disk must not hide the error itself."""
    with contextlib.suppress(OSError):
        write_atomic(run.path / ENDED, msgspec.json.format(msgspec.json.encode(ended), indent=1).decode() + "\n")


def stuck(run: RunDir, sentence: str) -> RunError:
    """The error of a run that the launcher ended."""
    return RunError(f"{sentence}; {run.last_saved()}", try_=f"qdist launch --resume --run {run.path}")


def died(run: RunDir, launcher_log: Path, began: int, code: int) -> RunError:
    """The rank that torch.distributed.run saw die first, and the last lines of its log."""
    with open(launcher_log, "rb") as log:
        log.seek(began)
        summary = log.read().decode(errors="replace")
    root = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", summary, re.DOTALL)
    if root is None:
        ended = "without finishing the run" if code == 0 else f"with exit code {code}"
        return RunError(f"the ranks ended {ended}:\n{_tail(summary.splitlines())}", try_=f"read {run.logs}")
    rank, exit_code = int(root[1]), int(root[2])
    path = run.log_file(rank)
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    advice = [line.removeprefix("  try: ") for line in lines[-3:] if line.startswith("  try: ")]
    hint = f"qdist launch --resume --run {run.path}" if run.checkpoint_steps() else f"read {path}"
    if exit_code == -signal.SIGKILL:
        how += ", which is what Linux does to a process when memory runs out"
    said = f"rank {rank} {how}; the last lines of {path}:\n{_tail(lines)}"
    return RunError(said, try_=advice[-1] if advice else hint)


def _tail(lines: list[str], count: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in deque(lines, count))
