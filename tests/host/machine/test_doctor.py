from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Cluster
from qdist.core.text import GIB, MIB
from qdist.host.machine.doctor import Check, Facts, diagnose, look
from qdist.host.machine.nvml import Card, Driver
from qdist.host.machine.probe import visible


def card(position: int, *, free_bytes: int = 139 * GIB) -> Card:
    return Card(uuid=f"GPU-{position}", position=position, name="H200", total_bytes=140 * GIB, free_bytes=free_bytes)


def cluster(*cards: Card) -> Cluster:
    return Cluster(
        device="cuda" if cards else "cpu",
        gpus=visible(cards, None),
        cpu_count=16,
        memory_bytes=128 * GIB,
        memory_free_bytes=100 * GIB,
    )


DRIVER = Driver(version="580.65", cuda=(12, 8), cards=(card(0), card(1)))
HEALTHY = Facts(
    cluster=cluster(*DRIVER.cards),
    driver=DRIVER,
    driver_problem="",
    versions={"python": "3.11.7", "platform": "Linux", "qdist": "0.1", "torch": "2.13.0", "bitsandbytes": "0.50.2",
              "gguf": "0.19.0"},
    requires_python=">=3.11",
    requirements=("torch>=2.6", "bitsandbytes<0.60,>=0.46", "liger-kernel>=0.5; extra == 'fast'",
                  "gguf>=0.10; extra == 'gguf'", "pytest; extra == 'dev'", "colorama; sys_platform == 'win32'"),
    disk_free_bytes=(("disk here", Path("/data"), 200 * GIB), ("model cache", Path("/cache"), 200 * GIB)),
    shm_bytes=8 * GIB,
    open_files=65536,
)  # fmt: skip


def found(facts: Facts, name: str) -> Check:
    (check,) = (check for check in diagnose(facts) if check.name == name)
    return check


def changed(**fields: object) -> Facts:
    return msgspec.structs.replace(HEALTHY, **fields)


def with_versions(**versions: str | None) -> Facts:
    merged = {**HEALTHY.versions, **versions}
    return changed(versions={name: version for name, version in merged.items() if version is not None})


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    assert [check for check in diagnose(HEALTHY) if check.status != "ok" or check.remedy] == []


def test_every_check_that_is_not_ok_says_what_to_try() -> None:
    poor = changed(
        cluster=cluster(card(0, free_bytes=GIB)), driver_problem="", requirements=None, versions={"python": "3.11.7",
        "platform": "Linux"}, shm_bytes=None, open_files=256,
        disk_free_bytes=(("disk here", Path("/"), 5), ("model cache", Path("/"), 5 * GIB)),
    )  # fmt: skip
    checks = [check for check in diagnose(poor) if check.status != "ok"]
    assert len(checks) > 8
    assert all(check.remedy for check in checks)


@pytest.mark.parametrize(
    ("facts", "name", "status", "detail"),
    [
        (with_versions(torch="2.13.0+cpu"), "torch build", "fail", "for the CPU only; 2 GPUs"),
        (with_versions(torch="2.13.0+rocm6.4"), "torch build", "fail", "AMD"),
        (with_versions(torch="2.13.0+cu130"), "torch build", "fail", "CUDA 13.0"),
        (with_versions(torch="2.13.0+cu126"), "torch build", "ok", "CUDA 12.6"),
        (with_versions(torch="2.13.0+cu129"), "torch build", "ok", "CUDA 12.9"),
        (with_versions(torch="2.13.0"), "torch build", "ok", ""),
        (with_versions(bitsandbytes=None), "bitsandbytes", "fail", "not installed"),
        (with_versions(bitsandbytes="0.45.0"), "bitsandbytes", "fail", "0.45.0; qdist needs <0.60,>=0.46"),
        (with_versions(bitsandbytes="0.50.0.dev0"), "bitsandbytes", "ok", "0.50.0.dev0"),
        (with_versions(torch="2.5.1+cu124"), "torch", "fail", "needs >=2.6"),
        (with_versions(python="3.9.2"), "Python", "fail", ">=3.11"),
        (HEALTHY, "liger-kernel", "ok", "optional"),
        (HEALTHY, "wandb", "ok", "not installed; optional"),
        (with_versions(**{"liger-kernel": "0.4"}), "liger-kernel", "warn", "made for >=0.5"),
        (changed(cluster=cluster(card(0), card(1, free_bytes=3 * GIB))), "GPU 1", "warn", "another process holds 137"),
        (changed(cluster=cluster()), "GPUs", "warn", "hides all 2 GPUs"),
        (changed(driver=None, cluster=cluster()), "driver", "warn", "no NVIDIA driver"),
        (changed(driver=None, driver_problem="version mismatch"), "driver", "fail", "version mismatch"),
        (changed(shm_bytes=64 * MIB), "/dev/shm", "warn", "64.0 MiB"),
        (changed(shm_bytes=64 * MIB, cluster=cluster(card(0))), "/dev/shm", "ok", "64.0 MiB"),
        (changed(open_files=256), "open files", "warn", "256"),
        (changed(open_files=-1), "open files", "ok", "unlimited"),
        (changed(requirements=None), "qdist", "warn", "not installed"),
        (changed(disk_free_bytes=(("disk here", Path("/w"), 500 * MIB),)), "disk here", "fail", "500 MiB free in /w"),
    ],
)
def test_what_a_user_gets_wrong_is_named(facts: Facts, name: str, status: str, detail: str) -> None:
    check = found(facts, name)
    assert (check.status, detail in check.detail) == (status, True), check


def test_cpu_torch_is_right_where_there_is_no_gpu() -> None:
    facts = msgspec.structs.replace(with_versions(torch="2.13.0+cpu"), driver=None, cluster=cluster())
    assert "torch build" not in {check.name for check in diagnose(facts)}


def test_requirements_of_other_platforms_and_of_developers_are_not_shown() -> None:
    assert not {"colorama", "pytest"} & {check.name for check in diagnose(HEALTHY)}


def test_a_broken_driver_is_a_finding_and_not_the_end(tmp_path: Path) -> None:
    def mismatch() -> Driver | None:
        raise MachineError("Driver/library version mismatch", try_="nvidia-smi")

    facts = look(read_driver=mismatch, environment={"HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path)
    assert facts.driver_problem == "Driver/library version mismatch; try nvidia-smi"
    assert facts.cluster.device == "cpu"
    assert found(facts, "driver").status == "fail"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_model_cache_is_where_huggingface_hub_puts_it(environment: dict[str, str], folder: str) -> None:
    facts = look(read_driver=lambda: None, environment=environment)
    assert facts.disk_free_bytes[1][:2] == ("model cache", Path(folder))


def test_requirements_beyond_the_known_packages_are_looked_up() -> None:
    facts = changed(requirements=("packaging>=20",), versions={**HEALTHY.versions, "packaging": "26.3"})
    assert found(facts, "packaging") == Check("packaging", "ok", "26.3 (>=20)")
