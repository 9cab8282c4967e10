"""Ranks on this machine: a shell that becomes their agent, in its own session."""

import os
import signal
import subprocess

from qdist.core.machine.environment import LAUNCH
from qdist.core.text import argument
from qdist.host import children
from qdist.host.launch.claim import Claim
from qdist.host.run.rundir import STOP, RunDir


class LocalRanks:
    """The ranks of a claimed run, started by its launch.sh; they end with this process. See `ranks.Ranks`."""

    def __init__(self, own: Claim) -> None:
        self._run: RunDir = own.job.run
        with open(self._run.logs / "launcher.log", "ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", argument(self._run.path / "launch.sh")],
                env={**children.environment(), LAUNCH: own.launch},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(own.lock,),
                preexec_fn=children.ending_with_this(),
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        (self._run.path / STOP).touch()

    def kill(self) -> None:
        # Also called in a signal handler, where waiting could wait for the code that was interrupted.
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        return self._process.wait()
