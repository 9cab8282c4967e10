"""What on this machine would prevent a run, and how to fix it."""

import os
import resource
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Cluster, Gpu
from qdist.core.telemetry.kernels import FAST_KERNELS
from qdist.core.text import GIB, format_bytes
from qdist.host.machine import nvml, probe

_OPTIONAL = {
    "liger-kernel": "fused kernels: faster, and less memory for logits",
    "wandb": "curves on wandb.ai",
    "tensorboard": "curves in TensorBoard",
    "mlflow": "curves in MLflow",
    "trackio": "curves in trackio",
    **FAST_KERNELS,
}


class Check(msgspec.Struct, frozen=True):
    """One check. `remedy` is the one thing to try, or empty."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `diagnose` judges."""

    cluster: Cluster
    driver: nvml.Driver | None
    driver_problem: str
    """Why the driver or the list of visible GPUs is unusable; empty if they work."""
    versions: Mapping[str, str]
    requires_python: str
    requirements: tuple[str, ...] | None
    """qdist's own requirements, in pip's syntax; None if qdist runs from a checkout that was not installed."""
    disk_free_bytes: tuple[tuple[str, Path, int], ...]
    """(what is stored there, folder, free bytes) of each folder."""
    shm_bytes: int | None
    open_files: int
    """Soft limit on open files."""


def look(
    *,
    read_driver: probe.ReadDriver = nvml.read,
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    cwd: Path = Path(),
) -> Facts:
    """Gather the facts. A driver that does not answer is one of them, not an error."""
    driver, problem = None, ""
    try:
        driver = read_driver()
        cluster = probe.cluster(read_driver=lambda: driver, environment=environment, root=root)
    except MachineError as error:
        problem = str(error).replace("\n  try: ", "; try ")
        cluster = probe.cluster(read_driver=lambda: None, environment=environment, root=root)
    shm = root / "dev/shm"
    requires_python, requirements = _own_requirements()
    return Facts(
        cluster=cluster,
        driver=driver,
        driver_problem=problem,
        versions=probe.versions(also=map(_name, requirements or ())),
        requires_python=requires_python,
        requirements=requirements,
        disk_free_bytes=(("disk here", cwd.resolve(), _free(cwd)), _model_cache(environment)),
        shm_bytes=_size(shm) if shm.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _own_requirements() -> tuple[str, tuple[str, ...] | None]:
    try:
        own = metadata.metadata("qdist")
    except metadata.PackageNotFoundError:
        return "", None
    return (own.get_all("Requires-Python") or [""])[0], tuple(metadata.requires("qdist") or ())


def _model_cache(environment: Mapping[str, str]) -> tuple[str, Path, int]:
    """Where huggingface_hub stores downloads: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = Path(environment.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    return "model cache", folder, _free(folder)


def _free(folder: Path) -> int:
    """Free bytes for this user where the folder is, or would be created."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize


def _size(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_blocks * usage.f_frsize


def diagnose(facts: Facts) -> tuple[Check, ...]:
    """Judge the facts, in the order in which a person would check them."""
    return (
        _python(facts),
        *_gpus(facts),
        *_torch_build(facts),
        *_packages(facts),
        _host(facts.cluster),
        *(_disk(*disk) for disk in facts.disk_free_bytes),
        *_shm(facts),
        _open_files(facts.open_files),
    )


def _python(facts: Facts) -> Check:
    version = facts.versions["python"]
    if version in SpecifierSet(facts.requires_python, prereleases=True):
        return Check("Python", "ok", f"{version} on {facts.versions['platform']}")
    return Check("Python", "fail", f"{version}; qdist needs {facts.requires_python}", "a venv with a newer Python")


def _gpus(facts: Facts) -> Iterator[Check]:
    if facts.driver_problem:
        yield Check("driver", "fail", facts.driver_problem)
    elif facts.driver is None:
        elsewhere = "qdist plan --model llama-65b --gpus 4 --gpu-memory 48GiB"
        yield Check("driver", "warn", "no NVIDIA driver: runs use the CPU", elsewhere)
    else:
        major, minor = facts.driver.cuda
        yield Check("driver", "ok", f"{facts.driver.version}, runs CUDA up to {major}.{minor}")
        if facts.driver.cards and not facts.cluster.gpus:
            hidden = f"CUDA_VISIBLE_DEVICES hides all {len(facts.driver.cards)} GPUs: runs use the CPU"
            yield Check("GPUs", "warn", hidden, "unset CUDA_VISIBLE_DEVICES")
    yield from (_gpu(gpu) for gpu in facts.cluster.gpus)


def _gpu(gpu: Gpu) -> Check:
    detail = f"{gpu.name}, {format_bytes(gpu.total_bytes)}, {format_bytes(gpu.free_bytes)} free"
    if gpu.free_bytes >= 0.8 * gpu.total_bytes:
        return Check(f"GPU {gpu.index}", "ok", detail)
    used = f"{detail}: another process holds {format_bytes(gpu.total_bytes - gpu.free_bytes)}"
    return Check(f"GPU {gpu.index}", "warn", used, "nvidia-smi names it; CUDA_VISIBLE_DEVICES leaves the GPU out")


def _torch_build(facts: Facts) -> Iterator[Check]:
    """Judged by the version's suffix alone: importing torch takes seconds, and a broken one may not import."""
    version, driver = facts.versions.get("torch"), facts.driver
    if version is None or driver is None or not driver.cards:
        return
    build = Version(version).local or ""
    remedy = f"install torch for CUDA {driver.cuda[0]}.{driver.cuda[1]} or older: https://pytorch.org"
    if build == "cpu":
        yield Check("torch build", "fail", f"{version} is for the CPU only; {len(driver.cards)} GPUs are here", remedy)
    elif build.startswith("rocm"):
        yield Check("torch build", "fail", f"{version} is for AMD GPUs; those here are NVIDIA's", remedy)
    elif build[:2] == "cu" and build[2:].isdecimal() and int(build[2:-1]) > driver.cuda[0]:
        yield Check("torch build", "fail", f"{version} needs a driver for CUDA {build[2:-1]}.{build[-1]}", remedy)
    else:
        yield Check(
            "torch build",
            "ok",
            f"for CUDA {build[2:-1]}.{build[-1]}" if build[:2] == "cu" else f"{version} is not the CPU-only one",
        )


def _packages(facts: Facts) -> Iterator[Check]:
    """Required packages against the version ranges of qdist's own metadata, then optional ones."""
    if facts.requirements is None:
        detail = "runs from a checkout that is not installed, so which versions it needs is not known"
        yield Check("qdist", "warn", detail, "pip install -e .")
    required = {_name(text): Requirement(text) for text in facts.requirements or () if _always(text)}
    extras = {_name(text): Requirement(text) for text in facts.requirements or () if _name(text) not in required}
    known = (name for name in probe.PACKAGES if name != "qdist" or facts.requirements is not None)
    for name in dict.fromkeys((*known, *required)):
        version = facts.versions.get(name)
        if name in required:
            yield _required(required[name], version)
        elif name in extras or name in _OPTIONAL:
            yield _optional(name, version, extras.get(name))
        elif version is not None:
            yield Check(name, "ok", version)
        elif facts.requirements is None:
            yield Check(name, "warn", "not installed", "pip install -e .")


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _always(requirement: str) -> bool:
    """Whether this machine needs a requirement even without any extra."""
    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate({"extra": ""})


def _required(need: Requirement, version: str | None) -> Check:
    install = f"pip install '{need.name}{need.specifier}'"
    if version is None:
        return Check(need.name, "fail", f"not installed; qdist needs {need.specifier or 'any version'}", install)
    if not need.specifier.contains(version, prereleases=True):
        return Check(need.name, "fail", f"{version}; qdist needs {need.specifier}", install)
    return Check(need.name, "ok", f"{version} ({need.specifier})" if need.specifier else version)


def _optional(name: str, version: str | None, need: Requirement | None) -> Check:
    gives = f" ({_OPTIONAL[name]})" if name in _OPTIONAL else ""
    if version is None:
        return Check(name, "ok", f"not installed; optional{gives}")
    if need is not None and not need.specifier.contains(version, prereleases=True):
        detail = f"{version}; qdist is made for {need.specifier}"
        return Check(name, "warn", detail, f"pip install '{name}{need.specifier}'")
    return Check(name, "ok", f"{version}, optional{gives}")


def _host(cluster: Cluster) -> Check:
    total, free = format_bytes(cluster.memory_bytes), format_bytes(cluster.memory_free_bytes)
    detail = f"{cluster.cpu_count} CPU cores, {total} of memory, {free} free"
    if cluster.memory_free_bytes < 2 * GIB:
        return Check("host", "warn", detail, "stop other programs, or ask the scheduler for more memory")
    return Check("host", "ok", detail)


def _disk(what: str, folder: Path, free_bytes: int) -> Check:
    detail = f"{format_bytes(free_bytes)} free in {folder}"
    where = "HF_HOME=/a/larger/disk" if what == "model cache" else "start from a folder on a larger disk"
    if free_bytes < GIB:
        return Check(what, "fail", detail, where)
    return Check(what, "warn" if free_bytes < 20 * GIB else "ok", detail, where if free_bytes < 20 * GIB else "")


def _shm(facts: Facts) -> Iterator[Check]:
    """/dev/shm, through which NCCL's and the data loader's processes talk; Docker gives 64 MiB by default."""
    if facts.shm_bytes is None:
        yield Check("/dev/shm", "warn", "not there", "mount it: mount -t tmpfs -o size=8g tmpfs /dev/shm")
    elif facts.shm_bytes < GIB and len(facts.cluster.gpus) > 1:
        yield Check("/dev/shm", "warn", format_bytes(facts.shm_bytes), "docker run --shm-size=8g, or --ipc=host")
    else:
        yield Check("/dev/shm", "ok", format_bytes(facts.shm_bytes))


def _open_files(limit: int) -> Check:
    if limit == resource.RLIM_INFINITY:
        return Check("open files", "ok", "unlimited")
    if limit < 1024:
        return Check("open files", "warn", f"at most {limit:,} at a time", "ulimit -n 4096")
    return Check("open files", "ok", f"at most {limit:,} at a time")
