"""The commands that a run was launched and resumed with, as they were typed."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from qdist.core.errors import RunError
from qdist.host.files import write_atomic
from qdist.host.opening import read_bytes
from qdist.host.rundir import RunDir

COMMANDS = "command.txt"


def note(run: RunDir, argv: Sequence[str]) -> None:
    """Add a launch to those before it. argv: of the process; of its program only the name is kept."""
    program, *arguments = argv
    # What holds a line break is quoted; bash reads one back from $'\n', and a command stays one line.
    line = shlex.join((Path(program).name, *arguments)).replace("\n", "'$'\\n''")
    write_atomic(run.path / COMMANDS, "".join(f"{known}\n" for known in (*noted(run), line)))


def noted(run: RunDir) -> tuple[str, ...]:
    """Each launch, first to last; empty for a run of a qdist that kept none."""
    path = run.path / COMMANDS
    return tuple(read_bytes(path, RunError).decode(errors="replace").splitlines()) if os.path.lexists(path) else ()
