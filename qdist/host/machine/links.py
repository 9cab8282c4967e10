"""How the GPUs are wired: NVLink, PCIe and NUMA, as NVML tells it without making a CUDA context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qdist.host.machine.nvml import asked, opened

_ANCESTORS = {
    0: "on one board",
    10: "over one PCIe switch",
    20: "over PCIe switches",
    30: "over a PCIe host bridge",
    40: "over the CPU",
    50: "from CPU to CPU",
}
"""Descriptions of nvmlGpuTopologyLevel_t values."""


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's own links; None if the driver does not say."""

    pcie_generation: int | None
    pcie_width: int | None
    nvlinks: int
    numa: int | None


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """Ports in the order requested, and for each pair of positions the shortest path between them in words."""

    ports: tuple[Port, ...]
    pairs: tuple[tuple[int, int, str], ...]

    @property
    def nvlink(self) -> bool:
        """Whether every pair is connected by NVLink."""
        return bool(self.pairs) and all(way == "NVLink" for _, _, way in self.pairs)


def read(uuids: Sequence[str], *, root: Path = Path("/")) -> Wiring | None:
    """Query NVML; None if there is none. Raises MachineError for a driver that does not answer."""
    pynvml = opened()
    if pynvml is None:
        return None
    try:
        return wiring(pynvml, uuids, root=root)
    finally:
        pynvml.nvmlShutdown()


def wiring(nvml: Any, uuids: Sequence[str], *, root: Path) -> Wiring | None:
    """What NVML reports about these GPUs; None if it does not know one of them."""
    handles = [asked(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid) for uuid in uuids]
    if None in handles:
        return None
    pairs = [
        (one, other, _way(nvml, handles[one], handles[other]))
        for one in range(len(handles))
        for other in range(one + 1, len(handles))
    ]
    return Wiring(ports=tuple(_port(nvml, handle, root) for handle in handles), pairs=tuple(pairs))


def describe(found: Wiring) -> str:
    """One line: 'NVLink between all 6 pairs, 18 links a GPU; PCIe 5 x16; NUMA 0 0 1 1'."""
    parts = [_pairs(found)] if found.pairs else []
    if any(port.nvlinks for port in found.ports):
        parts[-1:] = [", ".join((*parts[-1:], f"{_spread([port.nvlinks for port in found.ports])} NVLinks a GPU"))]
    buses = [f"{port.pcie_generation} x{port.pcie_width}" for port in found.ports if port.pcie_width]
    if buses:
        parts.append("PCIe " + _spread(buses))
    nodes = [str(port.numa) for port in found.ports if port.numa is not None]
    if len(set(nodes)) > 1:
        parts.append("NUMA " + " ".join(nodes))
    return "; ".join(parts) or "the driver does not say"


def _pairs(found: Wiring) -> str:
    ways: dict[str, list[str]] = {}
    for one, other, way in found.pairs:
        ways.setdefault(way, []).append(f"{one}-{other}")
    if len(ways) == 1:
        return next(iter(ways)) + (f" between all {len(found.pairs)} pairs" if len(found.pairs) > 1 else "")
    return ", ".join(f"{way} {' '.join(pairs)}" for way, pairs in ways.items())


def _spread(values: Sequence[object]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def _way(nvml: Any, one: Any, other: Any) -> str:
    state = asked(nvml, nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    if state == nvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    ancestor = asked(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, one, other)
    return _ANCESTORS.get(ancestor, "a way that the driver does not name")


def _port(nvml: Any, handle: Any, root: Path) -> Port:
    states = [asked(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)]
    return Port(
        pcie_generation=asked(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=asked(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        nvlinks=states.count(1),
        numa=_numa(asked(nvml, nvml.nvmlDeviceGetPciInfo, handle), root),
    )


def _numa(pci: Any, root: Path) -> int | None:
    """NUMA node from sysfs, whose PCI domains have four digits to NVML's eight; -1 there means unknown."""
    if pci is None:
        return None
    bus = pci.busId.decode() if isinstance(pci.busId, bytes) else str(pci.busId)
    domain, _, rest = bus.lower().partition(":")
    try:
        node = int((root / f"sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
