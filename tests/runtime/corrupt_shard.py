"""Two ranks gather a sharded model; then one byte of one rank's shard changes on its way. Forked by test_shard.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qdist.core.errors import RunError
from qdist.runtime.model.sliced import Peers
from qdist.runtime.placements.shard import Shard
from tests.runtime.tiny import backbone_of, dummy_job


def main() -> None:
    """Write down how many bytes agreed, and the error once one does not."""
    model = Path(sys.argv[1])
    dist.init_process_group("gloo")
    job = dummy_job(model, model.parent / "never", gpus=2, placement="shard", global_batch=2)
    place = Shard(job.plan, dist.get_rank(), (torch.device("cpu"),))
    backbone = backbone_of(job.plan, arrange=place.arrange)
    place.settle(backbone)
    intact = place.verify(backbone)
    target = backbone.model.layers[1].self_attn.q_proj.weight
    gather = Peers.gather

    def on_the_way(peers: Peers, whole: torch.Tensor, part: torch.Tensor) -> None:
        """One bit of a tensor of the second layer turns."""
        gather(peers, whole, part)
        if whole.data_ptr() == backbone.model.layers[1].input_layernorm.weight.untyped_storage().data_ptr():
            target.view(-1)[7] ^= 1

    Peers.gather = on_the_way
    try:
        place.verify(backbone)
        said = ""
    except RunError as error:
        said = str(error)
    answer = model.parent / f"corrupt-{dist.get_rank()}.json"
    answer.write_text(json.dumps({"intact_bytes": intact, "error": said}))
    dist.barrier()
    dist.destroy_process_group()
