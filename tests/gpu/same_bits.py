"""A rank of `test_placements.test_shards_compute_the_bits_of_a_whole_backbone`: trains nothing, compares two plans.

    torchrun --nproc-per-node 2 same_bits.py SHARDED_RUN WHOLE_RUN

Both backbones are loaded here. Each goes through its micro-batches without waiting for the device in between,
as a run does; then losses and gradients are compared.
"""

import os
import sys
from typing import Any

import torch

from qdist.core.planning.plan import Plan
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.torch import Comm
from qdist.runtime.placements.registry import placement_of
from qdist.runtime.train.setup import assemble, load_part, make_accelerator, pick_devices


def compute(plan: Plan, accelerator: Any, comm: Comm, devices: tuple[torch.device, ...]) -> tuple[Any, dict[str, Any]]:
    """Losses of two micro-batches without gradients and of six with, and what those add up to."""
    place = placement_of(plan, comm.rank, devices)
    parts = assemble(place, accelerator, load_part(place).backbone, pad_id=0)
    for name, parameter in sorted(parts.adapter.named().items()):
        if "lora_B" in name:  # of zeros, A would have no gradient
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    losses = []
    for index in range(8):
        ids = torch.randint(
            0, plan.facts.vocab, (1, 64), generator=torch.Generator().manual_seed(9 * index + comm.rank)
        )
        with torch.set_grad_enabled(index > 1):  # a run judges its start before its first step
            loss = parts.forward.loss({"input_ids": ids, "labels": ids})
        if index > 1:
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: parameter.grad.clone() for name, parameter in parts.adapter.named().items()}


def main() -> None:
    """Exit with the names that differ."""
    sharded, whole = RunDir(sys.argv[1]), RunDir(sys.argv[2])
    plan = sharded.plan()
    devices = pick_devices(plan, int(os.environ["RANK"]))
    accelerator = make_accelerator(plan, sharded)
    comm = Comm(devices[0])
    (losses, gradients), (others, wanted) = (compute(each, accelerator, comm, devices) for each in (plan, whole.plan()))
    differ = [name for name in wanted if not torch.equal(gradients[name], wanted[name])]
    print(
        f"rank {comm.rank}: losses {losses.tolist()} and {others.tolist()}, {len(differ)} gradients differ", flush=True
    )
    torch.distributed.destroy_process_group()
    assert torch.equal(losses, others), "losses differ"
    assert not differ, differ


if __name__ == "__main__":
    main()
