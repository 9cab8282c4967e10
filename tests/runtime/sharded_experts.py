"""Two ranks compute a sharded model with adapted experts beside a whole one. Started by test_expert_lora.py."""

import json
import sys
from pathlib import Path

import msgspec
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from qdist.runtime.adapters.attach import adapt
from qdist.runtime.placements import shard
from tests.runtime.adapters.test_expert_lora import config_for, randomized, trained
from tests.runtime.model.test_experts import passes
from tests.runtime.moe_models import facts_of_experts, packed_model
from tests.runtime.tiny import dummy_job, save_config


def main() -> None:
    """Print the bytes that were gathered as they are held, the experts that this rank holds, and the largest error."""
    folder, family = Path(sys.argv[1]), "qwen3_moe"
    dist.init_process_group("gloo")
    model = save_config(folder / f"model-{dist.get_rank()}")
    plan = dummy_job(model, folder / "never", gpus=2, placement="shard", global_batch=2).plan
    plan = msgspec.structs.replace(plan, facts=facts_of_experts(family))
    results, held = [], 0
    for arrange in (None, lambda skeleton: shard.shard(skeleton, plan)):
        backbone = packed_model(family, arrange=arrange or (lambda skeleton: None))
        if arrange:
            shard.settle(backbone)
            weight = backbone.get_submodule("model.layers.1.mlp.experts.gate_up_proj").weight
            assert isinstance(weight, DTensor)
            held = len(weight.to_local())
            checked = shard.check_gathered_bytes(backbone)
        model = randomized(adapt(backbone, config_for(family, ("q_proj", "experts"))))
        logits, gradient = passes(model)
        results.append([logits, gradient, *(value.grad for value in trained(model).values())])
    worst = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    sys.stdout.write(json.dumps({"checked": checked, "held": held, "worst": worst}) + "\n")
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
