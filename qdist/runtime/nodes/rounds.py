"""How do nodes gather for a generation? By torch's elastic rendezvous, over the run's own store."""

import os
import secrets
from datetime import timedelta
from ipaddress import IPv4Address
from typing import Any

from qdist.core.nodes.job import NodeJob
from qdist.runtime.nodes.board import CutOff
from qdist.runtime.nodes.meeting import Meeting

_LAST_CALL_S = 3.0
"""Seconds for further nodes to join once there are enough."""
_KEEP_ALIVE_S, _KEEP_ALIVES = 2.0, 4


def rendezvous_of(job: NodeJob, meeting: Meeting) -> Any:
    """torch's elastic rendezvous over the run's store, in which each generation of nodes is one round."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    # Otherwise its first node serves one more store, which listens on all addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    store = meeting.store
    timeout = RendezvousTimeout(
        join=timedelta(seconds=job.rejoin_s),
        last_call=timedelta(seconds=_LAST_CALL_S),
        close=timedelta(seconds=5),
        heartbeat=timedelta(seconds=5),
    )
    return DynamicRendezvousHandler.from_backend(
        "qdist", store, C10dRendezvousBackend(store, "qdist"), job.least, job.most,
        local_addr=unique_loopback(job.node), timeout=timeout,
        keep_alive_interval=_KEEP_ALIVE_S, keep_alive_max_attempt=_KEEP_ALIVES,
    )  # fmt: skip


def unique_loopback(node: int) -> str:
    """A loopback address that no other node of a run, and no other start of this one, is likely to have.

    torch 2.13 tells nodes apart by address and process id, which are equal for agents in containers.
    """
    return str(IPv4Address("127.0.0.0") + ((1 + secrets.randbelow(4094)) << 12) + node % 4096)


def newcomers(rendezvous: Any) -> int:
    """Number of nodes that wait to be let in. Raises CutOff where the store is gone."""
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    try:
        return int(rendezvous.num_nodes_waiting())
    except RendezvousConnectionError as error:
        raise CutOff(str(error)) from error
