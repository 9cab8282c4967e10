"""What the NVIDIA driver reports about itself and its GPUs, without the memory cost of a CUDA context."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from qdist.core.errors import MachineError

_NVML_MEMORY_V2 = 0x02000028


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A whole GPU, or one MIG slice of a GPU (`uuid` then begins with 'MIG-' and `position` is None)."""

    uuid: str
    position: int | None
    """GPU index as in nvidia-smi."""
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None if the driver does not say."""


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """A driver that answers."""

    version: str
    cuda: tuple[int, int]
    """The newest CUDA version it supports."""
    cards: tuple[Card, ...]


def read() -> Driver | None:
    """Query NVML; None if this machine has no NVML library or no driver.

    Raises MachineError when a driver is there but cannot be used, so that no run falls back to the CPU unnoticed.
    """
    pynvml = opened()
    if pynvml is None:
        return None
    try:
        cuda: int = pynvml.nvmlSystemGetCudaDriverVersion()
        return Driver(
            version=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda=(cuda // 1000, cuda % 1000 // 10),
            cards=tuple(cards(pynvml)),
        )
    except pynvml.NVMLError as error:
        raise MachineError(f"the NVIDIA driver cannot describe its GPUs: {error}", try_="nvidia-smi") from error
    finally:
        pynvml.nvmlShutdown()


def opened() -> Any:
    """pynvml, initialized, for the caller to shut down; None if there is no NVML library or driver.

    Raises MachineError when a driver is there but does not answer.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError as error:
        raise MachineError(
            f"the NVIDIA driver is there but does not answer: {error}",
            try_="nvidia-smi; a reboot mends a driver that was updated under a running kernel",
        ) from error
    return pynvml


def asked(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """NVML's answer, or None if the driver or card does not support the question."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def memory_of(nvml: Any, handle: Any) -> Any:
    """`total`, `free` and `used` bytes; also `reserved` for the driver, which drivers before R510 count as used."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=_NVML_MEMORY_V2)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def total_bytes(memory: Any) -> int:
    """Bytes that programs can allocate, from the answer of `memory_of`: the total without the driver's reserve."""
    return int(memory.total - getattr(memory, "reserved", 0))


def cards(nvml: Any) -> Iterator[Card]:
    """Every GPU in PCI bus order; a GPU partitioned by MIG gives its slices instead."""
    for position in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(position)
        if _is_cut(nvml, handle):
            for part in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                try:
                    slice_handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, part)
                except nvml.NVMLError_NotFound:
                    continue
                yield _card(nvml, slice_handle, None)
        else:
            yield _card(nvml, handle, position)


def _is_cut(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return False


def _card(nvml: Any, handle: Any, position: int | None) -> Card:
    memory = memory_of(nvml, handle)
    return Card(
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        position=position,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=total_bytes(memory),
        free_bytes=int(memory.free),
        capability=asked(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
    )
