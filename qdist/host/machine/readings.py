"""Current memory, utilization, power and temperature of this machine's GPUs, from an NVML handle kept open."""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from qdist.core.errors import MachineError
from qdist.core.telemetry.snapshot import Reading
from qdist.host.machine import nvml as driver
from qdist.host.machine.probe import visible_cards

_FAULTS = (
    ("nvmlClocksThrottleReasonHwThermalSlowdown", "it is too hot (hardware slowdown)"),
    ("nvmlClocksThrottleReasonSwThermalSlowdown", "it is too hot"),
    ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "its power supply asks it to brake"),
    ("nvmlClocksThrottleReasonHwSlowdown", "its hardware slows it down"),
)


class Readings:
    """The GPUs that CUDA shows this process, in its numbering; none without a driver.

    module: pynvml, or what stands for it in a test.
    Raises MachineError if the driver cannot name its GPUs.
    """

    def __init__(self, module: Any = None, environment: Mapping[str, str] = os.environ) -> None:
        self._nvml = module or driver.opened()
        self._handles: list[tuple[Any, str]] = []
        if self._nvml is not None:
            try:
                shown = visible_cards(tuple(driver.cards(self._nvml)), environment.get("CUDA_VISIBLE_DEVICES"))
                self._handles = [(self._nvml.nvmlDeviceGetHandleByUUID(card.uuid), card.name) for card in shown]
            except self._nvml.NVMLError as error:  # one of them is lost
                raise MachineError(f"the NVIDIA driver cannot describe its GPUs: {error}", try_="nvidia-smi") from error

    def __enter__(self) -> "Readings":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._handles = None, []

    def read(self) -> tuple[Reading, ...]:
        """Read every GPU now; a lost GPU reports only its name."""
        return tuple(self._read(handle, name) for handle, name in self._handles)

    def _read(self, handle: Any, name: str) -> Reading:
        nvml = self._nvml
        memory = driver.asked(nvml, driver.memory_of, nvml, handle)
        use = driver.asked(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        power = driver.asked(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
        limit = driver.asked(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        heat = driver.asked(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        reasons = driver.asked(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        return Reading(
            name=name,
            used_bytes=int(memory.used) if memory else 0,
            total_bytes=driver.total_bytes(memory) if memory else 0,
            utilization=None if use is None else use.gpu / 100,
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            temperature_c=heat,
            throttled=next((words for flag, words in _FAULTS if reasons & getattr(nvml, flag)), ""),
        )
