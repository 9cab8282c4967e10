"""Do several ranks share a GPU? Only where QDIST_RANKS_PER_GPU says so: tests of many ranks on few GPUs.

NCCL refuses two ranks on one GPU unless it takes them for different machines (`NCCL_HOSTID`); then they talk through
sockets, and the GPU runs them in turns. Everything is computed as on as many GPUs, and nothing is as fast.
"""

import os
from collections.abc import Mapping, MutableMapping, Sequence

import msgspec

from qdist.core.cluster import Gpu
from qdist.core.errors import MachineError

VARIABLE = "QDIST_RANKS_PER_GPU"


def ranks_per_gpu(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks each GPU takes: 1 unless the environment says more.

    Raises MachineError when it says anything but a positive number.
    """
    said = environment.get(VARIABLE, "1")
    if not said.isdecimal() or int(said) < 1:
        raise MachineError(f"{VARIABLE}={said} is not a positive number", try_=f"unset {VARIABLE}")
    return int(said)


def divided(gpus: Sequence[Gpu], count: int) -> tuple[Gpu, ...]:
    """Each GPU as `count` GPUs of a part of its memory, under another name: what it teaches plans is of such parts."""
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
    """Prepare this process for sharing its GPU with `count` - 1 others; nothing for a count of 1.

    Called before any library looks at the environment for a device or makes a communicator.
    """
    if count > 1:
        environment["LOCAL_RANK"] = str(int(environment["LOCAL_RANK"]) // count)
        environment["NCCL_HOSTID"] = f"rank{rank}"
