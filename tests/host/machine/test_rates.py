from pathlib import Path

import msgspec
import pytest

from qdist.core.machine.cluster import Rates
from qdist.core.machine.kernel_rates import usual_kernel_rates
from qdist.host.machine import probe

H200 = Rates(matmul_flops_s=790e12, memory_bytes_s=4e12, link_bytes_s=3e11, host_bytes_s=5e10, source="measured now")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_kept_is_found_again_for_the_same_cards_and_driver_alone() -> None:
    path = probe.keep_rates(["NVIDIA H200/x"] * 2, "580.65", H200)
    assert path.name == "NVIDIA-H200-x_x2_580.65.json"
    assert probe.measured_rates(["NVIDIA H200/x"] * 2, "580.65") == H200
    assert probe.known_rates(["NVIDIA H200/x"] * 2, "580.65") == H200
    assert probe.measured_rates(["NVIDIA H200/x"], "580.65") is None
    assert probe.measured_rates(["NVIDIA H200/x"] * 2, "580.66") is None


@pytest.mark.parametrize("content", [b"", b'{"matmul_flops_s": 1', b'{"flops": 1}', b"\xff"])
def test_a_file_that_is_no_rates_is_as_if_it_were_not_there(content: bytes) -> None:
    probe.keep_rates(["H200"], "1", H200).write_bytes(content)
    assert probe.measured_rates(["H200"], "1") is None


def test_rates_of_kernels_are_kept_and_those_kept_before_there_were_any_are_read() -> None:
    path = probe.keep_rates(["H200"], "1", H200)
    assert b'"kernels":null' in path.read_bytes().replace(b" ", b"")
    measured = msgspec.structs.replace(H200, kernels=usual_kernel_rates(790e12, 4e12))
    probe.keep_rates(["H200"], "1", measured)
    assert probe.measured_rates(["H200"], "1") == measured
    older = msgspec.json.decode(path.read_bytes())
    del older["kernels"]
    path.write_bytes(msgspec.json.encode(older))
    assert probe.measured_rates(["H200"], "1") == H200


def test_nothing_is_known_of_a_card_that_nobody_has_heard_of() -> None:
    assert probe.known_rates(["Some Unheard-of Card"], "1") is None
    assert probe.tabled_rates([]) is None


def test_cards_of_the_table_are_as_slow_as_the_slowest_and_all_must_be_known() -> None:
    fast, slow = probe.tabled_rates(["NVIDIA H200"]), probe.tabled_rates(["NVIDIA A10"])
    assert fast is not None
    assert slow is not None
    assert fast.matmul_flops_s > slow.matmul_flops_s
    assert probe.tabled_rates(["NVIDIA H200", "NVIDIA A10", "NVIDIA H200"]) == msgspec.structs.replace(
        slow, source=fast.source
    )
    assert probe.tabled_rates(["NVIDIA H200", "Some Unheard-of Card"]) is None
    assert probe.known_rates(["NVIDIA H200"], "1") == fast


def test_a_cache_that_cannot_be_made_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "file" / "cache"))
    assert probe.measured_rates(["H200"], "1") is None
