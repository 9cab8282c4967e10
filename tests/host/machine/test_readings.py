"""Are a GPU's readings those of the right GPU, and does a missing one leave the others?"""

from types import SimpleNamespace
from typing import Any

import pytest

from qdist.core.errors import MachineError
from qdist.host.machine.readings import Readings
from tests.host.machine.test_nvml import FakeNvml


class Sensors(FakeNvml):
    """Adds sensors to the fake GPUs; the old one does not know its power."""

    NVML_TEMPERATURE_GPU = 0
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonSwThermalSlowdown = 0x20
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80
    nvmlClocksThrottleReasonHwSlowdown = 0x08
    power_cap = 0x04

    def __init__(self, reasons: int = 0) -> None:
        self.reasons, self.closed = reasons, False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:
        if version and handle == "GPU-old":
            raise self.NVMLError_FunctionNotFound
        found = super().nvmlDeviceGetMemoryInfo(handle, version)
        return SimpleNamespace(**vars(found), used=10)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=98)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle == "GPU-old":
            raise self.NVMLError
        return 650_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlShutdown(self) -> None:
        self.closed = True


def readings(nvml: Any, **environment: str) -> Readings:
    return Readings(nvml, environment)


def test_a_gpu_says_its_memory_use_power_and_heat() -> None:
    card = readings(Sensors()).read()[0]
    assert (card.name, card.used_bytes, card.total_bytes) == ("H200 new", 10, 93)
    assert (card.utilization, card.power_w, card.power_limit_w, card.temperature_c) == (0.98, 650, 700, 61)
    assert card.throttled == ""


def test_a_lost_gpu_is_an_error_of_the_machine() -> None:
    class Lost(Sensors):
        def nvmlDeviceGetHandleByIndex(self, position: int) -> str:
            raise self.NVMLError("GPU is lost")

    with pytest.raises(MachineError, match="cannot describe its GPUs: GPU is lost"):
        readings(Lost())


def test_what_a_gpu_does_not_know_is_left_out() -> None:
    old = readings(Sensors()).read()[1]
    assert old.power_w is None
    assert (old.used_bytes, old.total_bytes) == (10, 100)
    assert old.temperature_c == 61


def test_gpus_are_numbered_as_cuda_numbers_them() -> None:
    assert [card.name for card in readings(Sensors(), CUDA_VISIBLE_DEVICES="1,0").read()] == ["H200 old", "H200 new"]
    assert readings(Sensors(), CUDA_VISIBLE_DEVICES="").read() == ()


@pytest.mark.parametrize(
    ("reasons", "said"),
    [(Sensors.power_cap, ""), (0x24, "it is too hot"), (0x48, "it is too hot (hardware slowdown)"), (0x08, "its hard")],
)
def test_heat_and_faults_throttle_and_a_power_limit_does_not(reasons: int, said: str) -> None:
    throttled = readings(Sensors(reasons)).read()[0].throttled
    assert throttled == said or (throttled.startswith(said) and said)


def test_the_driver_is_let_go_at_the_end() -> None:
    nvml = Sensors()
    with readings(nvml) as opened:
        assert opened.read()
    assert nvml.closed
