"""The processes of one node's ranks: started with their place in the run, ended together."""

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

from qdist.core.errors import JobError
from qdist.core.machine.environment import AGENT
from qdist.core.nodes.job import KEEPS, PREPARED
from qdist.core.planning.plan import Plan, RankPlan, digest
from qdist.core.planning.render import rank_environment
from qdist.host import children
from qdist.host.launch.agent import WORKER, describe_failure
from qdist.host.run.rundir import STOP, RunDir
from qdist.host.run.state import died, log_lengths

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str:
    """Name of the network interface that has an IPv4 address; empty if none has. Loopback has all of 127.0.0.0/8."""
    address = "127.0.0.1" if address.startswith("127.") else address
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), "")


def _address_of(interface: str) -> str:
    """The first IPv4 address of an interface (netdevice(7), SIOCGIFADDR); empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            found = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return ""
    return socket.inet_ntoa(found[20:24])


class OwnRanks:
    """The ranks of a plan on this node.

    place: of this node among the plan's. port: of the run's store, on loopback. keeps: whether the run directory is
    this node's own, so that one of its ranks keeps the checkpoints there. prepared: file of what this node has
    prepared, unless that lies where the plan says.
    """

    def __init__(
        self,
        plan: Plan,
        run: RunDir,
        *,
        generation: int,
        place: int,
        port: int,
        address: str,
        keeps: bool,
        prepared: Path | None = None,
    ) -> None:
        self._run = run
        own = [rank for rank in plan.ranks if rank.node == place]
        self.ranks = tuple(rank.rank for rank in own)
        (run.path / STOP).unlink(missing_ok=True)
        self._before = log_lengths(run)
        command = [sys.executable, "-u", "-P", "-m", WORKER, str(run.path), "--digest", digest(plan)]
        shared = _environment(plan, address) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # Ranks are clients of the run's store, each generation under its own names; see torch.distributed.elastic.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(generation),
            "WORLD_SIZE": str(plan.world_size),
            "LOCAL_WORLD_SIZE": str(len(own)),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            AGENT: str(os.getpid()),
            PREPARED: str(prepared or ""),
        }
        with open(run.logs / "launcher.log", "ab") as log:
            started = [
                subprocess.Popen(
                    command,
                    env=shared | _place(plan, rank, keeps=keeps),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=children.ending_with_this(),
                )
                for rank in own
            ]
        self._processes = dict(zip(self.ranks, started, strict=True))

    def stop(self) -> None:
        """Ask the ranks to save after this step and exit."""
        (self._run.path / STOP).touch()

    def make_way(self) -> None:
        """Have the ranks save and exit, or just exit before their first step, for others to go on from there."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()

    def ended(self) -> bool:
        """Whether all have ended well."""
        return all(process.poll() == 0 for process in self._processes.values())

    def failure(self) -> JobError | None:
        """How the first that failed did."""
        for rank, process in self._processes.items():
            if code := process.poll():
                with open(self._run.logs / "launcher.log", "a") as log:
                    log.write(describe_failure(rank, code) + "\n")
                return died(self._run, self._before, code)
        return None

    def forget(self) -> None:
        """Count those that were killed as ended."""
        self._processes = {}

    def kill(self) -> None:
        """End what still runs, at once, and wait for it."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()


def _environment(plan: Plan, address: str) -> dict[str, str]:
    exports, usual = rank_environment(plan)
    kept = children.environment()
    interface = interface_of(address)
    # Sockets for data listen on the interface of the node's address, not on the first that a library finds.
    sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {**usual, **sockets, **kept, **exports}


def _place(plan: Plan, rank: RankPlan, *, keeps: bool) -> dict[str, str]:
    local = plan.world.local_rank_of(plan.world.ranks[rank.rank])
    own = {"RANK": str(rank.rank), "LOCAL_RANK": str(local)}
    return own | ({KEEPS: "1"} if keeps and local == 0 and rank.rank else {})
