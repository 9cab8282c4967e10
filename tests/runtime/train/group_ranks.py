"""A rank that joins its run's group as a worker does, and writes which addresses it listens on."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qdist.host.run.rundir import RunDir
from qdist.runtime.train.setup import make_accelerator

_LISTENING = "0A"


def main() -> None:
    run = RunDir(sys.argv[1])
    accelerator = make_accelerator(run.plan(), run)
    total = torch.ones(1)
    dist.all_reduce(total)
    found = {"ranks": int(total), "processes": accelerator.num_processes, "addresses": listened_on()}
    (run.path / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def listened_on() -> list[str]:
    """Addresses of this process' listening sockets, as /proc has them: bytes of words in this machine's order."""
    own = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_there(name)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_rest = line.split()
            if state == _LISTENING and f"socket:[{line.split()[9]}]" in own:
                found.append(local.partition(":")[0])
    return found


def _is_there(descriptor: str) -> bool:
    """Whether it is still open: that of the listing itself is not."""
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
