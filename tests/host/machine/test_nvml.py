from types import SimpleNamespace

from qdist.host.machine import nvml


class FakeNvml:
    """Three GPUs as pynvml shows them: one new, one with a driver too old for memory v2, one cut into two slices."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NVMLError,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (Exception,), {})
    NVMLError_NotFound = type("NVMLError_NotFound", (Exception,), {})

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, position: int) -> str:
        return ("new", "old", "cut")[position]

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if handle == "old":
            raise self.NVMLError_NotSupported
        return (1, 1) if handle == "cut" else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, part: int) -> str:
        if part not in (0, 3):
            raise self.NVMLError_NotFound
        return f"MIG-{part}"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:
        if version is None:
            return SimpleNamespace(total=100, free=90)
        if handle == "old":
            raise self.NVMLError_FunctionNotFound
        return SimpleNamespace(total=100, reserved=7, free=90)

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle if handle.startswith("MIG") else f"GPU-{handle}"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        if handle == "old":
            raise self.NVMLError_NotSupported
        return (9, 0)

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"H200 {handle}"


def test_cards_are_whole_gpus_or_the_slices_of_a_cut_one() -> None:
    found = [(card.uuid, card.position) for card in nvml.cards(FakeNvml())]
    assert found == [("GPU-new", 0), ("GPU-old", 1), ("MIG-0", None), ("MIG-3", None)]


def test_memory_that_the_driver_keeps_does_not_count_where_the_driver_says_so() -> None:
    assert [card.total_bytes for card in nvml.cards(FakeNvml())] == [93, 100, 93, 93]


def test_a_card_has_the_compute_capability_that_the_driver_says() -> None:
    assert [card.capability for card in nvml.cards(FakeNvml())] == [(9, 0), None, (9, 0), (9, 0)]
