"""What does the network between nodes cost each placement of a 65B, and from which rate on is it cheap? By the plan.

    python bench/network_knee.py [--model llama-65b] [--nodes 2] [--gpus 4] [--gpu-name A100-SXM4-80GB] [--batch 64]

Prints the table of docs/guide/nodes.md, "What the network costs": bytes that a node sends a step, tokens/s at each
rate, and the knee, the rate from which on the network takes at most 5 % of a step.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from qdist.core.errors import QdistError
from qdist.core.machine.cards import described
from qdist.core.machine.cluster import Cluster, Network
from qdist.core.machine.nodes import alike
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.network import WORTH_SAYING
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import plan_once
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import format_bytes, format_count, format_rate

RATES_GBIT = (1, 10, 25, 100, 200)
LATENCY_S = 1e-4
_FASTEST_GBIT = 10_000.0
_TRIES = 40
"""Halvings of the range of rates in which the knee is looked for."""


def network(gbit: float) -> Network:
    """A network of a rate."""
    return Network(bytes_s=gbit * 1e9 / 8, latency_s=LATENCY_S, source="given")


def ways(gpus: int, nodes: int) -> dict[str, dict[str, Any]]:
    """Settings of each placement, by what the table calls it."""
    within, across = {"gpus_per_group": gpus}, {"gpus_per_group": gpus * nodes}
    return {
        "replicate": {"placement": "replicate", "zero.stage": 0},
        "replicate, 16 bits": {"placement": "replicate", "optim.reduce_dtype": "bfloat16"},
        "replicate, ZeRO 2": {"placement": "replicate", "zero.stage": 2},
        f"shard within nodes, groups of {gpus}": {"placement": "shard", "zero.stage": 0, **within},
        f"shard across nodes, one group of {gpus * nodes}": {"placement": "shard", "zero.stage": 0, **across},
        f"split within nodes, groups of {gpus}": {"placement": "split", **within},
        f"split across nodes, one group of {gpus * nodes}": {"placement": "split", **across},
    }


def plan_of(model: str, machine: Cluster, nodes: int, gbit: float, settings: dict[str, Any]) -> Plan:
    """The plan of a placement at a rate."""
    config = config_of(model)
    spec = resolve({"steps": 5, "model": model}, nest(settings))
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    cluster = alike(machine, nodes, None, network(gbit))
    return plan_once(spec, source, from_config(config, name=model), cluster, None, has_liger=True)


def share(plan: Plan) -> float:
    """Share of a step that the network takes."""
    return plan.network_seconds * plan.tokens_per_second / plan.step_tokens


def knee(plan_at: Any) -> str:
    """The rate from which on the network takes at most 5 % of a step; what is left is latency where none does."""
    low, high = 0.01, _FASTEST_GBIT
    if share(plan_at(high)) > WORTH_SAYING:
        return "none"
    for _ in range(_TRIES):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if share(plan_at(middle)) <= WORTH_SAYING else (middle, high)
    return format_rate(high * 1e9 / 8)


def rows(model: str, machine: Cluster, nodes: int, batch: int) -> Iterator[list[str]]:
    """The table, header first."""
    yield ["placement", "sent a step", *(f"{gbit} Gbit/s" for gbit in RATES_GBIT), "at most 5 % from"]
    for name, own in ways(len(machine.gpus), nodes).items():
        settings = {"global_batch": batch, **own}

        def at(gbit: float, settings: dict[str, Any] = settings) -> Plan:
            return plan_of(model, machine, nodes, gbit, settings)

        try:
            plans = [at(gbit) for gbit in RATES_GBIT]
        except QdistError as error:
            yield [name, error.message, *("" for _ in RATES_GBIT), ""]
            continue
        speeds = (f"{format_count(plan.tokens_per_second)} ({100 * share(plan):.0f} %)" for plan in plans)
        yield [name, format_bytes(plans[-1].network_bytes), *speeds, knee(at)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-65b")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--gpu-name", default="A100-SXM4-80GB")
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    machine = described(gpus=asked.gpus, gpu_name=asked.gpu_name, gpu_memory=None)
    found = list(rows(asked.model, machine, asked.nodes, asked.batch))
    for index, row in enumerate(found):
        print(f"| {' | '.join(row)} |")
        if index == 0:
            print("|---" * len(row) + "|")


if __name__ == "__main__":
    main()
