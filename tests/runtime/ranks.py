"""A process that has imported everything once and forks ranks: what a rank's imports cost is paid once a suite.

Reads one JSON job a line, {"module": ..., "nodes": [{"ranks": ..., ...}, ...]} with the fields of `conftest.OnNode`:
each rank calls `main` of the module, with what its node has. Writes the exit codes of the ranks.
"""

import gc
import json
import os
import socket
import sys
import traceback
from importlib import import_module
from typing import Any

from qdist.core.nodes.job import KEEPS

IMPORTED = (
    "bitsandbytes",
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "peft",
    "transformers.models.llama.modeling_llama",
    "accelerate.commands.config.config_args",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "qdist.runtime.infer.decoding",
    "qdist.runtime.placements.registry",
    "qdist.runtime.placements.replicate",
    "qdist.runtime.placements.shard",
    "qdist.runtime.placements.split.ranks",
    "qdist.runtime.train.inventory",
    "qdist.runtime.train.loop",
    "qdist.runtime.train.result",
    "qdist.runtime.train.setup",
    "qdist.runtime.train.worker",
)
"""What ranks import, most of it where they need it."""


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # what ranks share, so that none of their collections walks it, and copies its pages
    print("ready", file=sys.__stderr__)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_run(job)), flush=True)


def _run(job: dict[str, Any]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(node, local) for node in job["nodes"] for local in range(node["ranks"])]
    children = [
        _fork(job["module"], node, port, rank=rank, local_rank=local, world_size=len(places))
        for rank, (node, local) in enumerate(places)
    ]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _fork(module: str, node: dict[str, Any], port: int, *, rank: int, local_rank: int, world_size: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(node["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        KEEPS: "1" if node["keeps"] and local_rank == 0 else "0",
    } | node["environment"]
    code = 1
    try:
        import torch

        # What a plan gives one rank is all cores, and other tests run on them: threads would wait for each other many
        # times longer than they work.
        torch.set_num_threads = lambda count: None
        sys.argv = [module, *node["arguments"]]
        import_module(module).main()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
