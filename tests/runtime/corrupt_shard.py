"""Two ranks gather a sharded model; then one byte of one rank's shard changes on its way. Started by test_shard.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from qdist.core.errors import RunError
from qdist.runtime.placements import shard
from tests.runtime.tiny import backbone_of, dummy_job


def main() -> None:
    """Print how many bytes agreed, and the error once one does not."""
    model = Path(sys.argv[1])
    dist.init_process_group("gloo")
    job = dummy_job(model, model.parent / "never", gpus=2, placement="shard", global_batch=2)
    backbone = backbone_of(job.plan, arrange=lambda skeleton: shard.shard(skeleton, job.plan))
    shard.settle(backbone)
    intact = shard.check_gathered_bytes(backbone)
    layer = backbone.model.layers[1]
    original = shard.slice_sums
    target = layer.self_attn.q_proj.weight
    assert isinstance(target, DTensor)
    bytes_of_it = target.numel()

    def on_the_way(flat: torch.Tensor, first: int) -> torch.Tensor:
        """What arrives has one bit turned in the first tensor of this size."""
        if flat.numel() == bytes_of_it and layer.self_attn.q_proj.weight is not target:
            flat = flat.clone()
            flat[7] ^= 1
        return original(flat, first)

    shard.slice_sums = on_the_way
    try:
        shard.check_gathered_bytes(backbone)
        said = ""
    except RunError as error:
        said = str(error)
    sys.stdout.write(
        json.dumps({"intact_bytes": intact, "error": said}) + "\n"
    )  # in one piece, beside the other rank's
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
