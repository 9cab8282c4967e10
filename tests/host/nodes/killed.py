"""Processes that kill themselves at their Nth access to a file, to be started for every N."""

import os
import signal
import sys
from pathlib import Path

from qdist.host.nodes.gate import Gate
from qdist.host.nodes.mirror import Files, fetch_checkpoint, send_checkpoint
from qdist.host.run.rundir import RunDir

TOKEN = "0123456789abcdef"
_ACCESSES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod")


def kill_at(number: int) -> None:
    left = number

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _ACCESSES:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def serve(folder: str, number: str) -> None:
    with Gate(("127.0.0.1", 0), TOKEN, store=None, folder=Path(folder)) as gate:
        print(gate.port, flush=True)
        kill_at(int(number))
        sys.stdin.read()


def copy(folder: str, number: str, port: str) -> None:
    files, run = Files(("127.0.0.1", int(port)), TOKEN), RunDir(folder)
    files.hello()
    kill_at(int(number))
    fetch_checkpoint(files, run, 10)
    send_checkpoint(files, run, 20)


if __name__ == "__main__":
    {"serve": serve, "copy": copy}[sys.argv[1]](*sys.argv[2:])
