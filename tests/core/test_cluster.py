import pytest

from qdist.core.cluster import hypothetical
from qdist.core.errors import SpecError
from qdist.core.units import GIB


def test_a_machine_one_does_not_have_is_empty() -> None:
    machine = hypothetical(4, 48 * GIB)
    assert machine.device == "cuda"
    assert [(gpu.index, gpu.free_bytes) for gpu in machine.gpus] == [(index, 48 * GIB) for index in range(4)]


@pytest.mark.parametrize(("gpus", "memory"), [(0, 48 * GIB), (-1, 48 * GIB), (4, 48)])
def test_a_machine_without_gpus_or_memory_is_refused(gpus: int, memory: int) -> None:
    with pytest.raises(SpecError):
        hypothetical(gpus, memory)
