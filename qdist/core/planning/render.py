"""The plan as the files that the ranks use: DeepSpeed, Accelerate, the launch script. Pure text and dicts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qdist.core.errors import SpecError
from qdist.core.machine.environment import AGENT, EVALUATE, FOREIGN
from qdist.core.machine.world import Node
from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Plan, digest

DEEPSPEED_FILE = "deepspeed.json"
ACCELERATE_FILE = "accelerate.json"
CHANNELS, STAGE_CHANNELS = "NCCL_MAX_NCHANNELS", 8
"""NCCL's channels between the stages of a pipeline, which send little: all of them would take 1 GiB more of a GPU."""


def deepspeed_policy(plan: Plan) -> str:
    """The file of `ds_configs/` that the plan calls for."""
    return f"zero{plan.zero_stage}{'_offload' if plan.spec.zero.offload == 'cpu' else ''}.json"


def deepspeed_config(plan: Plan, policy: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration: the policy with the plan's numbers in it, and no 'auto' left.

    Precision stays float32 on purpose: only the float32 adapter is DeepSpeed's, the backbone computes under
    autocast, and fp16 losses are scaled by the loop.
    """
    if "auto" in _leaves(policy):
        raise SpecError(
            f"{deepspeed_policy(plan)} holds 'auto', which only transformers' Trainer can fill in", try_="a number"
        )
    return {
        **policy,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "train_batch_size": plan.micro_batch * plan.gradient_accumulation * plan.data_parallel,
        # Stage 0 has no optimizer of DeepSpeed's own to clip in; the engine clips there.
        "gradient_clipping": plan.spec.optim.clip if plan.zero_stage else 0.0,
    }


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Accelerate's configuration file, as `accelerate config` would write it for this run.

    Of several nodes it is that of any: their agents find each other, and say who is the first.
    """
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _distributed_type(plan),
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": max(1, len(plan.nodes)),
        "num_processes": plan.world_size,
        "rdzv_backend": "c10d" if plan.nodes else "static",
        "same_network": True,
        "use_cpu": plan.device == "cpu",
    }
    if plan.engine == "deepspeed":
        config["deepspeed_config"] = {"deepspeed_config_file": DEEPSPEED_FILE, "zero3_init_flag": False}
    return config


def _distributed_type(plan: Plan) -> str:
    if plan.engine == "deepspeed":
        return "DEEPSPEED"
    return f"MULTI_{'GPU' if plan.device == 'cuda' else 'CPU'}" if plan.world_size > 1 else "NO"


PASSIVE = "PASSIVE"
"""How threads wait on CPUs that others use as well: spinning, they take turns with those that they wait for."""

COALESCE = "glibc.malloc.tcache_count=0"
"""glibc's malloc without its thread cache. torch asks for memory aligned to 64 bytes; glibc (2.36) takes 96 bytes more
and gives back what is in front, which the cache keeps from joining its neighbours again: what was freed is then too
small for the next tensor of the same size, and the heap grows instead. SmolLM2's demo at micro_batch=1, peak resident
set of a rank: 1,331 MiB with the cache, 835 without; at 8, 1,457 and 1,285; no slower (23.5 and 24.1 s of CPU time)."""


def rank_environment(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """Variables of every rank; and those that hold unless the environment says otherwise."""
    exports = {
        "OMP_NUM_THREADS": str(plan.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",
    }
    if plan.device == "cpu":
        # An empty list hides GPUs from a run that was planned for CPUs; DeepSpeed must be told as well.
        exports |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # NVML numbers cards by bus, CUDA fastest first unless told; the plan speaks NVML.
        exports |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    usual = {CHANNELS: str(STAGE_CHANNELS)} if layout_of(plan).stages > 1 else {}
    if plan.device == "cpu":
        usual |= {"OMP_WAIT_POLICY": PASSIVE, "GLIBC_TUNABLES": COALESCE}
    return exports, usual


_FIND_RUN = 'run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)'


def launch_script(plan: Plan, *, python: str, evaluates: bool = False) -> str:
    """The shell script that starts the ranks; it finds its run directory beside itself.

    Of several nodes it says how they are started: the nodes' agents start the ranks, and no node those of another.
    python: the interpreter of the environment that planned the run. evaluates: instead of training.
    """
    if plan.nodes:
        return _script_of_nodes(plan)
    agent = f'-P -m qdist.host.launch.agent {plan.world_size} "$run" --digest {digest(plan)}'
    exports, usual = rank_environment(plan)
    lines = [
        "#!/bin/sh",
        f"# {' '.join(plan.spec.model.split())}: {plan.world_size} {plan.device} rank(s), written by qdist",
        _FIND_RUN,
        "# What other launchers say of ranks, in the shell that this is started from, is not of this run.",
        f"unset $(env | sed -nE 's/^({FOREIGN})=.*/\\1/p')",
        f"export {AGENT}=$$",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *(f'export {name}="${{{name}:-{value}}}"' for name, value in usual.items()),
        f"exec {shlex.quote(python)} {agent}{f' {EVALUATE}' * evaluates}",
    ]
    return "\n".join(lines) + "\n"


def _script_of_nodes(plan: Plan) -> str:
    count = len(plan.nodes)
    lines = [
        "#!/bin/sh",
        f"# {' '.join(plan.spec.model.split())}: {plan.world_size} {plan.device} rank(s) on {count} nodes, written by "
        "qdist",
        *(f"# {line}" for line in _places(plan)),
        _FIND_RUN,
        "# A node starts its own ranks only, once it has met the others.",
        "cat >&2 <<END",
        f"This run is on {count} nodes. Start it from one of them, over ssh,",
        '  qdist launch --resume --run "$run" --hosts hosts.toml',
        "or on each with the run's token in QDIST_TOKEN, or in a file that QDIST_TOKEN_FILE names, R from 0,",
        f'  qdist launch --resume --run "$run" --nnodes {count} --node-rank R --rendezvous FIRST_NODE:29400',
        "END",
        "exit 2",
    ]
    return "\n".join(lines) + "\n"


def _places(plan: Plan) -> Iterator[str]:
    """'node 0, a: ranks 0 to 3 on GPUs 0 to 3', for each node."""
    world = plan.world
    for node, machine in enumerate(plan.nodes):
        ranks = world.ranks_on(Node(node))
        gpus = [gpu for rank in ranks for gpu in plan.ranks[rank].gpus]
        on = f" on GPU{_first_to_last(gpus)}" if gpus else ""
        yield f"node {node}, {' '.join(machine.name.split())}: rank{_first_to_last(ranks)}{on}"


def _first_to_last(numbers: Sequence[int]) -> str:
    return f"s {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f" {numbers[0]}"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    return [value]
