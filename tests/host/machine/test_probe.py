import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Cluster, Gpu, Rates
from qdist.core.text import GIB
from qdist.host.machine import probe
from qdist.host.machine.nvml import Card, Driver

CARDS = tuple(
    Card(
        uuid=f"GPU-{letter * 4}-{position}", position=position, name="H200", total_bytes=140 * GIB, free_bytes=139 * GIB
    )
    for position, letter in enumerate("abcd")
)
SLICES = tuple(
    Card(uuid=f"MIG-{part}", position=None, name="H200 MIG 1g.18gb", total_bytes=18 * GIB, free_bytes=18 * GIB)
    for part in range(2)
)


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with the given files, and 64 GiB of which 60 are available."""
    meminfo = f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {60 * 2**20} kB\nHugePages_Total: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("setting", "positions"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("GPU-cccc-2,GPU-a", [2, 0]),
        ("gpu-bbbb", []),
        ("GPU-dddd-3,GPU-,0", [3]),
        ("1,GPU-d", [1, 3]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,9,1", [0]),
        ("GPU-", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_gpus_are_those_cuda_shows_in_its_order(setting: str | None, positions: list[int]) -> None:
    named = [Card(uuid=c.uuid, position=c.position, name=str(c.position), total_bytes=1, free_bytes=1) for c in CARDS]
    assert [int(gpu.name) for gpu in probe.visible(named, setting)] == positions


def test_visible_gpus_are_numbered_from_zero() -> None:
    assert probe.visible(CARDS, "3")[0] == Gpu(index=0, name="H200", total_bytes=140 * GIB, free_bytes=139 * GIB)


@pytest.mark.parametrize("setting", ["1,1", "1,GPU-bbbb"])
def test_a_gpu_named_twice_is_refused(setting: str) -> None:
    with pytest.raises(MachineError, match="twice"):
        probe.visible(CARDS, setting)


@pytest.mark.parametrize(
    ("cards", "setting", "names"),
    [
        (SLICES, None, ["H200 MIG 1g.18gb"]),
        (SLICES, "MIG-1", ["H200 MIG 1g.18gb"]),
        ((*SLICES, CARDS[1]), None, ["H200"]),
        (SLICES, "0", []),
    ],
)
def test_a_slice_is_used_alone(cards: tuple[Card, ...], setting: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in probe.visible(cards, setting)] == names


def test_no_driver_makes_a_cpu_cluster(tmp_path: Path) -> None:
    found = probe.cluster(read_driver=lambda: None, environment={}, root=machine(tmp_path, {}))
    assert (found.device, found.gpus) == ("cpu", ())
    assert found.cpu_count >= 1
    assert (found.memory_bytes, found.memory_free_bytes) == (64 * GIB, 60 * GIB)


def test_a_driver_makes_a_cuda_cluster_unless_every_gpu_is_hidden(tmp_path: Path) -> None:
    driver = Driver(version="580.1", cuda=(13, 0), cards=CARDS)
    root = machine(tmp_path, {})
    assert len(probe.cluster(read_driver=lambda: driver, environment={}, root=root).gpus) == 4
    hidden = probe.cluster(read_driver=lambda: driver, environment={"CUDA_VISIBLE_DEVICES": ""}, root=root)
    assert (hidden.device, hidden.gpus) == ("cpu", ())
    assert probe.driver(read_driver=lambda: driver) == "580.1"
    assert probe.driver(read_driver=lambda: None) is None


def test_rates_are_asked_for_the_visible_gpus_and_never_for_a_cpu(tmp_path: Path) -> None:
    driver, root = Driver(version="580.1", cuda=(13, 0), cards=CARDS), machine(tmp_path, {})
    asked: list[tuple[list[str], str]] = []
    rates = Rates(matmul_flops_s=1, memory_bytes_s=1, link_bytes_s=1, host_bytes_s=1, source="measured")

    def read_rates(names: Sequence[str], version: str) -> Rates:
        asked.append((list(names), version))
        return rates

    def found(visible: str) -> Cluster:
        environment = {"CUDA_VISIBLE_DEVICES": visible}
        return probe.cluster(read_driver=lambda: driver, read_rates=read_rates, environment=environment, root=root)

    assert found("1,2").rates == rates
    assert found("").rates is None
    assert asked == [(["H200", "H200"], "580.1")]


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NO_LIMIT = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        pytest.param(
            {"proc/self/cgroup": "0::/job\n", f"{V2}/job/memory.max": "max\n"}, 64 * GIB, 60 * GIB, id="v2 no limit"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/job\n", f"{V2}/job/memory.max": f"{8 * GIB}\n",
             f"{V2}/job/memory.current": f"{3 * GIB}\n", f"{V2}/job/memory.stat": f"anon 1\ninactive_file {GIB}\n"},
            8 * GIB, 6 * GIB, id="v2 limit, cached files are free",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/slurm/job/step\n", f"{V2}/slurm/job/step/memory.max": "max\n",
             f"{V2}/slurm/job/memory.max": f"{16 * GIB}\n"},
            16 * GIB, 16 * GIB, id="v2 limit of a parent",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/not/mounted/here\n", f"{V2}/memory.max": f"{4 * GIB}\n"},
            4 * GIB, 4 * GIB, id="v2 inside a container",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:cpu,memory:/job\n4:pids:/\n", f"{V1}/job/memory.limit_in_bytes": f"{2 * GIB}\n",
             f"{V1}/job/memory.usage_in_bytes": f"{3 * GIB}\n", f"{V1}/memory.limit_in_bytes": NO_LIMIT},
            2 * GIB, 0, id="v1 limit exceeded",
        ),
    ],
)  # fmt: skip
def test_host_memory_is_capped_by_the_cgroup(files: dict[str, str], total: int, free: int, tmp_path: Path) -> None:
    assert probe.host_memory(machine(tmp_path, files)) == (total, free)


def test_versions_are_of_what_is_installed() -> None:
    found = probe.versions(also=["pytest", "no-such-package"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"platform", "msgspec", "click", "pytest"} <= set(found)
    assert "no-such-package" not in found


def test_probing_this_machine_imports_no_torch() -> None:
    asked = "probe.cluster(); probe.versions(); assert 'torch' not in sys.modules"
    code = f"import sys; from qdist.host.machine import probe; {asked}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_uuid_without_digits_names_no_gpu_even_where_there_is_one() -> None:
    assert probe.visible(CARDS[:1], "GPU-") == ()
