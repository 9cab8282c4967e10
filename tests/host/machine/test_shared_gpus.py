import pytest

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Gpu
from qdist.core.text import GIB
from qdist.host.machine.probe import divided, ranks_per_gpu, take_turns


def test_a_gpu_is_as_many_as_ranks_share_it() -> None:
    gpus = [Gpu(index=index, name="H200", total_bytes=140 * GIB, free_bytes=100 * GIB) for index in range(2)]
    assert divided(gpus, 1) == tuple(gpus)
    parts = divided(gpus, 4)
    assert [gpu.index for gpu in parts] == list(range(8))
    assert {gpu.name for gpu in parts} == {"H200 (1/4)"}, "what a shared GPU teaches is not for whole ones"
    assert {(gpu.total_bytes, gpu.free_bytes) for gpu in parts} == {(35 * GIB, 25 * GIB)}


def test_ranks_share_only_where_that_is_asked_for() -> None:
    assert ranks_per_gpu({}) == 1
    assert ranks_per_gpu({"QDIST_RANKS_PER_GPU": "2"}) == 2
    for wrong in ("0", "-1", "two", "1.5", ""):
        with pytest.raises(MachineError, match="QDIST_RANKS_PER_GPU"):
            ranks_per_gpu({"QDIST_RANKS_PER_GPU": wrong})


def test_ranks_that_share_look_like_machines_to_nccl() -> None:
    alone = {"LOCAL_RANK": "3"}
    take_turns(3, 1, alone)
    assert alone == {"LOCAL_RANK": "3"}
    shared = {"LOCAL_RANK": "3"}
    take_turns(3, 2, shared)
    assert shared == {"LOCAL_RANK": "1", "NCCL_HOSTID": "rank3"}
