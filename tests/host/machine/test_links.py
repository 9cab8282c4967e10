from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdist.host.machine import links


class FakeNvml:
    """Four GPUs: NVLink within 0-1 and 2-3, else over the CPU; the last one answers little."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_NVLINK_MAX_LINKS = 2, 0, 6

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if not uuid.startswith("GPU-"):
            raise self.NVMLError
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        return 0 if one // 2 == other // 2 else 5

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        return 40

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if handle == 3 or link > 4:
            raise self.NVMLError
        return int(link < 4)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 8 if handle == 2 else 16

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"0000000{handle}:1B:00.0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for handle, node in enumerate(("0", "1", "-1")):
        folder = tmp_path / f"sys/bus/pci/devices/000{handle}:1b:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node + "\n")
    return tmp_path


def wiring(root: Path, *uuids: str) -> Any:
    return links.wiring(FakeNvml(), uuids, root=root)


def test_ports_and_pairs_are_read_in_the_order_asked_for(root: Path) -> None:
    found = wiring(root, "GPU-2", "GPU-0", "GPU-3")
    assert found.pairs == ((0, 1, "over the CPU"), (0, 2, "NVLink"), (1, 2, "over the CPU"))
    assert [port.nvlinks for port in found.ports] == [4, 4, 0]
    assert [port.numa for port in found.ports] == [None, 0, None]
    assert not found.nvlink


@pytest.mark.parametrize(
    ("uuids", "said"),
    [
        (("GPU-0", "GPU-1"), "NVLink, 4 NVLinks a GPU; PCIe 5 x16; NUMA 0 1"),
        (("GPU-0", "GPU-1", "GPU-2"),
         "NVLink 0-1, over the CPU 0-2 1-2, 4 NVLinks a GPU; PCIe 5 x16 5 x16 5 x8; NUMA 0 1"),
        (("GPU-0",), "4 NVLinks a GPU; PCIe 5 x16"),
        (("GPU-3",), "PCIe 5 x16"),
    ],
)  # fmt: skip
def test_wiring_is_one_line(uuids: tuple[str, ...], said: str, root: Path) -> None:
    assert links.describe(wiring(root, *uuids)) == said


def test_a_gpu_that_nvml_does_not_know_gives_no_wiring(root: Path) -> None:
    assert wiring(root, "GPU-0", "MIG-1") is None


def test_all_pairs_with_nvlink(root: Path) -> None:
    assert wiring(root, "GPU-2", "GPU-3").nvlink
