import msgspec
import pytest

from qdist.core.errors import SpecError
from qdist.core.machine.cluster import Rates, hypothetical, joined
from qdist.core.text import GIB


def test_a_machine_one_does_not_have_is_empty() -> None:
    machine = hypothetical(4, 48 * GIB)
    assert machine.device == "cuda"
    assert [(gpu.index, gpu.free_bytes) for gpu in machine.gpus] == [(index, 48 * GIB) for index in range(4)]


@pytest.mark.parametrize(("count", "gib", "expected"), [(1, 24, 64), (4, 48, 384)])
def test_its_host_memory_is_what_such_machines_have_unless_told(count: int, gib: int, expected: int) -> None:
    assert hypothetical(count, gib * GIB).memory_bytes == expected * GIB
    assert hypothetical(count, gib * GIB, host_memory_bytes=16 * GIB).memory_bytes == 16 * GIB


@pytest.mark.parametrize(("gpus", "memory"), [(0, 48 * GIB), (-1, 48 * GIB), (4, 48)])
def test_a_machine_without_gpus_or_memory_is_refused(gpus: int, memory: int) -> None:
    with pytest.raises(SpecError):
        hypothetical(gpus, memory)


def test_nodes_are_as_fast_as_the_slowest_and_unknown_if_one_of_them_is() -> None:
    plain = hypothetical(1, 24 * GIB)
    slow, fast = (
        msgspec.structs.replace(
            plain,
            rates=Rates(matmul_flops_s=flops, memory_bytes_s=1, link_bytes_s=1, host_bytes_s=1, source="measured"),
        )
        for flops in (1, 2)
    )
    assert joined([fast, slow], ["a", "b"], [None, None], None).rates == slow.rates
    assert joined([fast, plain], ["a", "b"], [None, None], None).rates is None
