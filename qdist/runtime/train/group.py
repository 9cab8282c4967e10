"""How do the ranks of a run find each other? Through a store that listens on the address named, and nowhere else."""

import os
import socket
from collections.abc import Mapping

import torch.distributed as dist

from qdist.core.planning.plan import Plan
from qdist.runtime.placements.base import PROCESS_GROUP_TIMEOUT

AGENT_STORE, GENERATION = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"
"""torch's environment variables: 'True' where somebody else serves the store; which formation of the run this is."""


def join_group(plan: Plan) -> None:
    """Join the process group of all ranks; a rank alone needs none. Collective.

    Before Accelerate or DeepSpeed, which take a group that is there: the store of their own listens on all addresses.
    """
    if plan.world_size > 1:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "gloo" if plan.device == "cpu" else "nccl",
            store=store_of(os.environ),
            rank=rank,
            world_size=size,
            timeout=PROCESS_GROUP_TIMEOUT,
        )


def store_of(environment: Mapping[str, str]) -> dist.Store:
    """The store of this generation: that of the node's agent, or on one machine rank 0's.

    An agent's store outlives generations, so each has keys of its own; torch's env:// had one prefix for all (2.13).
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    serves = environment["RANK"] == "0" and environment.get(AGENT_STORE) != "True"
    store = dist.TCPStore(
        host,
        port,
        is_master=serves,
        master_listen_fd=_bound(host, port) if serves else None,
        wait_for_workers=False,
        timeout=PROCESS_GROUP_TIMEOUT,
    )
    return dist.PrefixStore(f"generation_{environment.get(GENERATION, '0')}", store)


def _bound(host: str, port: int) -> int:
    """Descriptor of a socket on this address alone, which whoever started the rank may hold too, without listening."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    own.bind((host, port))
    return own.detach()
