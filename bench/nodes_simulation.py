"""How often should a run of many nodes that fail save? By the plan's model, without any machine:
`python -m bench.nodes_simulation [--days 300] [--seed 0] [--network 25] [--disk 1] [--let-in-every 15]`.

LLaMA 65B, 8 x A100 80 GB a node, 16 samples of 512 tokens a GPU and step. A node fails at random, once in 30 days or,
on spot instances, once in 3; it is back after 10 minutes. A failure is noticed after 10 to 30 s and costs the steps
since the last checkpoint; the others start again, which takes 60 s and the reading of weights and adapter, and share
the same batch. When a node is back the run saves, and starts again with it: at once, as the agents
do, or with all that are back at fixed times (`--let-in-every MINUTES`).
"""

import argparse
import heapq
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from qdist.core.machine.cards import described
from qdist.core.machine.cluster import Network, joined
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.spec.run_spec import resolve

DAY_S = 86_400.0
NODES, INTERVALS = (1, 8, 64, 512), (10, 50, 250)
MEAN_DAYS = {"30 days": 30.0, "3 days (spot)": 3.0}
SAMPLES, GPUS, CARD = 16, 8, "A100-SXM4-80GB"
RESTART_S = 60.0
STATE_BYTES = 12
"""Bytes of a checkpoint for each adapter parameter: its value and Adam's two moments in float32."""


class Costs(NamedTuple):
    """What a run's steps and its misfortunes take."""

    nodes: int
    step_s: float
    """Seconds per optimizer step on all nodes."""
    network_s: float
    """Seconds of them that the network takes, on any number of nodes."""
    save_s: float
    start_s: float
    """Seconds from the decision to start again to the first step."""
    mean_s: float
    """Mean seconds between failures of one node; infinite for none."""
    away_s: float = 600.0
    noticed_s: tuple[float, float] = (10.0, 30.0)
    let_in_s: float = 0.0
    """Seconds between the times at which nodes that are back are let in; 0 for at once."""

    def step_on(self, nodes: int) -> float:
        """Seconds per step on fewer nodes, which share the same batch."""
        return (self.step_s - self.network_s) * self.nodes / nodes + (self.network_s if nodes > 1 else 0.0)

    def let_in(self, time: float) -> float:
        """When a node is let in that is back at some time."""
        return math.ceil(time / self.let_in_s) * self.let_in_s if self.let_in_s else time

    @property
    def best_interval_s(self) -> float:
        """Seconds between checkpoints that lose least (Young 1974, Daly 2006: first order)."""
        return max(self.step_s, math.sqrt(2 * self.save_s * self.mean_s / self.nodes) - self.save_s)

    @property
    def best_interval(self) -> int:
        """That in steps."""
        return max(1, round(self.best_interval_s / self.step_s))


class Outcome(NamedTuple):
    """What became of a run."""

    steps: int
    """Steps that were done and not lost."""
    lost: int
    failures: int
    share: float
    """Tokens, as a share of those of a run that neither fails nor saves."""


class Nodes:
    """Which nodes are there, and what happens to them next."""

    def __init__(self, costs: Costs, seed: int) -> None:
        self._costs, self._random = costs, random.Random(seed)
        self.there = costs.nodes
        self._events: list[tuple[float, bool]] = []
        for _ in range(costs.nodes):
            self._fail_after(0.0)

    def _fail_after(self, time: float) -> None:
        if math.isfinite(self._costs.mean_s):
            heapq.heappush(self._events, (time + self._random.expovariate(1 / self._costs.mean_s), False))

    @property
    def next_s(self) -> float:
        return self._events[0][0] if self._events else math.inf

    def happen(self) -> bool:
        """Let the next event happen; whether a node is back."""
        time, back = heapq.heappop(self._events)
        self.there += 1 if back else -1
        if back:
            self._fail_after(time)
        else:
            heapq.heappush(self._events, (self._costs.let_in(time + self._costs.away_s), True))
        return back

    def noticed_s(self) -> float:
        return self._random.uniform(*self._costs.noticed_s)


def simulate(costs: Costs, *, interval: int, seconds: float, seed: int) -> Outcome:
    """A run that saves every `interval` steps, until `seconds` are over."""
    nodes, clock, saved, lost, failures = Nodes(costs, seed), 0.0, 0, 0, 0
    ready = costs.start_s
    while True:
        # Nodes that fail while the run starts make it start again; those that are back by then are in it.
        while nodes.next_s < ready or 2 * nodes.there < costs.nodes:
            clock = max(clock, nodes.next_s)
            if not nodes.happen():
                failures += 1
                clock += nodes.noticed_s()
                ready = clock + costs.start_s
            elif 2 * nodes.there >= costs.nodes > 2 * (nodes.there - 1):  # enough of them again
                ready = clock + costs.start_s
        end = min(nodes.next_s, seconds)
        kept, steps, rest_s = worked(max(0.0, end - ready), costs.step_on(nodes.there), costs.save_s, interval)
        if end >= seconds:
            done = saved + steps
            return Outcome(done, lost, failures, done * costs.step_s / seconds)
        if nodes.happen():
            saved += steps + 1
            clock = end + rest_s + costs.save_s
        else:
            failures += 1
            saved, lost = saved + kept, lost + steps - kept
            clock = end + nodes.noticed_s()
        ready = clock + costs.start_s


def worked(seconds: float, step_s: float, save_s: float, interval: int) -> tuple[int, int, float]:
    """Steps that are saved, steps that are done, and the rest of the step under way after some seconds of work."""
    cycles, within_s = divmod(seconds, interval * step_s + save_s)
    steps = min(interval, int(within_s / step_s))
    kept = int(cycles) * interval
    return kept, kept + steps, max(0.0, (steps + 1) * step_s - within_s)


def plan_of(nodes: int, network: Network) -> Plan:
    """The plan of 65B on some nodes."""
    config = config_of("llama-65b")
    node = described(gpus=GPUS, gpu_name=CARD, gpu_memory=None)
    names = [f"node{number}" for number in range(nodes)]
    cluster = joined([node] * nodes, names, [GPUS] * nodes, network) if nodes > 1 else node
    settings = {"model": "llama-65b", "steps": 1, "seq_len": 512, "global_batch": SAMPLES * GPUS * nodes, "gpus": GPUS}
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    return make_plan(resolve(settings), source, from_config(config, name="llama-65b"), cluster, None, has_liger=True)


def costs_of(plan: Plan, *, nodes: int, mean_s: float, disk_bytes_s: float, let_in_s: float = 0.0) -> Costs:
    """Each node reads the weights once, and the checkpoint; one rank writes it while the others wait."""
    copies = plan.groups / nodes
    weights = sum(budget.weights for rank in plan.ranks[:GPUS] for budget in rank.expected) / copies
    state = STATE_BYTES * plan.adapter_parameters
    return Costs(
        nodes=nodes, step_s=plan.step_tokens / plan.tokens_per_second, network_s=plan.network_seconds,
        save_s=state / disk_bytes_s, start_s=RESTART_S + (weights + state) / disk_bytes_s, mean_s=mean_s,
        let_in_s=let_in_s,
    )  # fmt: skip


def row(name: str, costs: Costs, *, seconds: float, seed: int) -> tuple[str, ...]:
    """A line of the table: tokens a day of an ideal run, and shares of them."""
    tokens = SAMPLES * GPUS * costs.nodes * 512 * DAY_S / costs.step_s
    intervals = (*INTERVALS, costs.best_interval)
    found = [simulate(costs, interval=each, seconds=seconds, seed=seed) for each in intervals]
    shares = [f"{100 * each.share:.1f} %" for each in found]
    return (
        name, str(costs.nodes), f"{costs.step_s:.1f} s", f"{tokens / 1e6:,.0f} M", *shares[:-1],
        f"{shares[-1]} at {costs.best_interval:,}",
    )  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    every = [f"every {each} steps" for each in INTERVALS]
    head = ("a node fails once in", "nodes", "a step", "tokens a day", *every, "Young/Daly")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", type=float, default=25.0, help="Gbit/s")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s")
    parser.add_argument("--let-in-every", type=float, default=0.0, metavar="MINUTES")
    asked = parser.parse_args()
    network = Network(bytes_s=asked.network * 1e9 / 8, latency_s=1e-4, source="given")
    plans = {nodes: plan_of(nodes, network) for nodes in NODES}
    rows = [
        row(
            name,
            costs_of(
                plan, nodes=nodes, mean_s=days * DAY_S, disk_bytes_s=asked.disk * 1e9, let_in_s=60 * asked.let_in_every
            ),
            seconds=asked.days * DAY_S, seed=asked.seed,
        )
        for name, days in MEAN_DAYS.items()
        for nodes, plan in plans.items()
    ]  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
