import torch

from qdist.runtime.train.measure import disk_read_bytes, load_peak, peak

CPU = torch.device("cpu")


def test_on_the_cpu_the_largest_resident_set_is_all_there_is() -> None:
    before = load_peak(CPU)
    block = torch.ones(64 << 18)  # 64 MiB, touched
    found = peak(CPU, load=before)
    assert (found.allocated, found.reserved, found.load) == (0, 0, before)
    assert found.context == found.total >= before > 0
    assert block.sum() == block.numel()


def test_bytes_from_disk_only_grow() -> None:
    assert 0 <= disk_read_bytes() <= disk_read_bytes()
