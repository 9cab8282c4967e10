"""How did a launch end, if not by finishing? As an error for the user, and as a file for whoever looks later."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from qdist.core.errors import JobError
from qdist.core.text import resuming
from qdist.host.children import killed_by
from qdist.host.files import write_atomic
from qdist.host.run.rundir import ENDED, Ended, RunDir


def note(run: RunDir, ended: Ended) -> None:
    """For whoever looks at the run later; a full disk must not hide the error itself."""
    with contextlib.suppress(OSError):
        write_atomic(run.path / ENDED, msgspec.json.format(msgspec.json.encode(ended), indent=1).decode() + "\n")


def stuck(run: RunDir, sentence: str) -> JobError:
    """The error of a run that the launcher ended."""
    return JobError(f"{sentence}; {run.last_saved()}", try_=resuming(run.path))


def lost(run: RunDir) -> JobError:
    """The error of a run whose directory was taken away."""
    return JobError(
        f"{run.path} was removed or moved while it was being trained; its ranks were ended",
        try_="put it back and resume it, or a new run",
    )


def log_lengths(run: RunDir) -> dict[Path, int]:
    """Bytes of each log: what earlier launches said, which is no word of the one to come."""
    return {path: path.stat().st_size for path in run.logs.glob("*.log")}


def died(run: RunDir, before: Mapping[Path, int], code: int) -> JobError:
    """The rank that torch.distributed.run saw die first, why, and the last lines of its log.

    before: what `log_lengths` gave when the ranks were started. The message's first line stands for itself.
    """
    summary = read_new_lines(run.logs / "launcher.log", before)
    root = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", "\n".join(summary), re.DOTALL)
    if root is None:
        ended = "without finishing the run" if code == 0 else f"with exit code {code}"
        return JobError(f"the ranks ended {ended}:\n{_tail(summary)}", try_=f"read {run.logs}")
    rank, exit_code = int(root[1]), int(root[2])
    path = run.log_file(rank)
    lines = read_new_lines(path, before)
    if exit_code < 0:
        how = killed_by(-exit_code)
    else:
        how = f"ended with exit code {exit_code}" + (f": {why}" if (why := find_reason(lines)) else "")
    advice = [line.removeprefix("  try: ") for line in lines[-3:] if line.startswith("  try: ")]
    hint = resuming(run.path) if run.checkpoint_steps() else f"read {path}"
    last = f"\nthe last lines of {path}:\n{_tail(lines)}" if lines else f"\n{path} has no word of it"
    return JobError(f"rank {rank} {how}{last}", try_=advice[-1] if advice else hint)


def read_new_lines(log: Path, before: Mapping[Path, int]) -> list[str]:
    """The lines of a log behind what it held before; none where there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(before.get(log, 0))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def find_reason(lines: Sequence[str]) -> str:
    """The error that a rank left with: qdist's own, or the last line of a traceback; empty where there is neither."""
    said = [line.removeprefix("[rank").partition("]: ")[2] if line.startswith("[rank") else line for line in lines]
    for pattern in (r"error: (.+)", r"((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)"):
        found = [match[1] for line in said if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return ""


def _tail(lines: Sequence[str], count: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in lines[-count:])
