"""Starts the ranks of this machine and ends them together: `python -m qdist.host.launch.agent RANKS RUN --digest D`.

In the place of torch.distributed.run, which imports torch before it starts anything. Like that one it tells the ranks
where they are by environment variables, ends all of them when one fails, and says which failed first.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from qdist.core.machine.environment import EVALUATE
from qdist.core.nodes.job import KEEPS, PREPARED
from qdist.host.terminal import say

WORKER, EVALUATOR = "qdist.runtime.train.worker", "qdist.runtime.train.evaluator"
_PATIENCE_S = 30.0
"""Seconds that ranks get to save and end once they were asked to; torch.distributed.run's."""
_LOOK_S = 0.05
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
"""The loopback interface."""
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main() -> None:
    """Start the ranks, wait for them, and exit as they did: 0 if all ended well, 1 if one failed."""
    count, (worker, *arguments) = int(sys.argv[1]), started_with(sys.argv[2:])
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in _ASKING:
        signal.signal(number, ask)
    with _reserved() as kept:
        command = [sys.executable, "-u", "-P", "-m", worker, *arguments]
        address = kept.getsockname()
        ranks = [
            subprocess.Popen(command, env={**os.environ, **variables_of(rank, count, address)}) for rank in range(count)
        ]
        try:
            failed = wait_for(ranks, asked)
        finally:
            end(ranks)
    if failed is not None:
        say(describe_failure(failed, ranks[failed].returncode), err=True)
    raise SystemExit(1 if any(rank.returncode for rank in ranks) else 0)


def started_with(words: Sequence[str]) -> list[str]:
    """The module that ranks run, and its arguments."""
    return [EVALUATOR if EVALUATE in words else WORKER, *(word for word in words if word != EVALUATE)]


def _reserved() -> socket.socket:
    """A port for rank 0 to listen on. It stays bound here, so that nobody else gets it meanwhile.

    Linux lets a second socket listen on a port that is only bound, if both set SO_REUSEADDR, as rank 0 does.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept


def variables_of(rank: int, count: int, address: tuple[str, int]) -> Mapping[str, str]:
    """What a rank's environment says of its place. address: where rank 0 listens."""
    host, port = address
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        # What CPU ranks of one machine send each other stays on it, and nobody else can connect to them.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
        KEEPS: "0",  # whatever a shell has: one rank writes a machine's checkpoints
        PREPARED: "",
        # A collective that fails ends its rank, instead of leaving it in wait; as torch.distributed.run has it.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


def wait_for(ranks: "Sequence[subprocess.Popen[bytes]]", asked: Sequence[int]) -> int | None:
    """Wait until all ranks have ended well, one has failed, or this process was asked to end; the rank that failed.

    asked: signals that came; more may come while this waits.
    """
    while not asked:
        codes = [rank.poll() for rank in ranks]
        failed = next((number for number, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(_LOOK_S)
    return None


def end(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End the ranks that still run: they may finish a step and save it, but not for ever."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _PATIENCE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def describe_failure(rank: int, code: int) -> str:
    """What `qdist.host.run.state.died` reads: which rank failed first, and how."""
    return f"Root Cause (first observed failure):\n  rank      : {rank}\n  exitcode  : {code}"


if __name__ == "__main__":
    main()
