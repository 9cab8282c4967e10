"""Two ranks compute a sharded model with adapted experts beside a whole one. Forked by test_expert_lora.py."""

import json
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from qdist.runtime.adapters.attach import adapt
from qdist.runtime.model.sliced import Sliced
from qdist.runtime.placements.shard import Shard
from tests.runtime.adapters.test_expert_lora import config_for, randomized, trained
from tests.runtime.model.test_experts import passes
from tests.runtime.moe_models import facts_of_experts, packed_model
from tests.runtime.tiny import dummy_job, save_config


def main() -> None:
    """Write down the bytes compared, those of a matrix of experts, how many this rank holds, the largest error."""
    folder, family = Path(sys.argv[1]), "qwen3_moe"
    dist.init_process_group("gloo")
    model = save_config(folder / f"model-{dist.get_rank()}")
    plan = dummy_job(model, folder / "never", gpus=2, placement="shard", global_batch=2).plan
    plan = msgspec.structs.replace(plan, facts=facts_of_experts(family))
    results, held, whole = [], 0, 0
    for place in (None, Shard(plan, dist.get_rank(), (torch.device("cpu"),))):
        backbone = packed_model(family, arrange=place.arrange if place else (lambda skeleton: None))
        if place:
            place.settle(backbone)
            weight = backbone.get_submodule("model.layers.1.mlp.experts.gate_up_proj").weight
            assert isinstance(weight, Sliced)
            held, whole = len(weight.kept), weight.nbytes
            checked = place.verify(backbone)
        model = randomized(adapt(backbone, config_for(family, ("q_proj", "experts"))))
        logits, gradient = passes(model)
        results.append([logits, gradient, *(value.grad for value in trained(model).values())])
    worst = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    answer = folder / f"answer-{dist.get_rank()}.json"
    answer.write_text(json.dumps({"checked": checked, "held": held, "whole": whole, "worst": worst}))
    dist.barrier()
    dist.destroy_process_group()
