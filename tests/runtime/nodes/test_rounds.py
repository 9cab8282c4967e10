from types import SimpleNamespace

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from qdist.runtime.nodes.board import CutOff
from qdist.runtime.nodes.rounds import newcomers


def test_a_store_that_is_gone_cuts_off_who_looks_for_newcomers() -> None:
    def gone() -> int:
        raise RendezvousConnectionError("the connection has failed")

    assert newcomers(SimpleNamespace(num_nodes_waiting=lambda: 2)) == 2
    with pytest.raises(CutOff, match="has failed"):
        newcomers(SimpleNamespace(num_nodes_waiting=gone))
