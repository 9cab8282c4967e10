"""Where do the parts of a model lie while it is evaluated, and how many sequences are scored at a time?"""

from collections.abc import Iterator
from typing import Any

import msgspec

from qdist.core.errors import PlanError, QdistError, SpecError
from qdist.core.evaluation.windows import longest_scored
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import DataFacts, Plan, Source
from qdist.core.planning.planner import make_plan, plan_once
from qdist.core.planning.resources import count_of
from qdist.core.spec.run_spec import RunSpec, changed
from qdist.host.machine.recurrence import fla_problem
from qdist.host.sources.facts import facts_of

_MICRO_BATCHES = (8, 4, 2, 1)
"""Sequences at a time that room is looked for on GPUs, in this order."""


def evaluation_plan(
    spec: RunSpec, source: Source, here: Cluster, *, data: DataFacts | None = None, window: int | None = None
) -> Plan:
    """Where a model lies for evaluation: a copy on each GPU if that fits, else in shards, else split.

    Room is looked for as for training short of what that keeps: with all layers recomputed, and the most sequences at a
    time that fit. window: tokens of the longest text; None for the usual.
    Raises PlanError where nothing fits, SpecError for settings that do not go together.
    """
    facts = facts_of(source.config, name=spec.model, code=source.own_code)
    usual = longest_scored(spec.seq_len, facts.max_positions)
    longest = window or usual
    if longest > facts.max_positions:
        raise SpecError(
            f"a window of {longest:,} tokens, and {spec.model} has {facts.max_positions:,} positions",
            try_=f"--window {usual}",
        )
    wanted = _scoring_spec(spec, max(longest, usual))
    count, no_fla = count_of(wanted, here), fla_problem(here)
    first: QdistError | None = None
    for change in _ways(wanted, count, here.device):
        own = changed(wanted, change)
        try:
            plan = plan_once(own, source, facts, here, None, no_fla=no_fla)
        except (PlanError, SpecError) as error:
            first = first or error
            continue
        return msgspec.structs.replace(plan, data=data)
    last: dict[str, Any] = {"micro_batch": 1, "global_batch": count}
    return make_plan(changed(wanted, last), source, facts, here, None, no_fla=no_fla)


def _ways(spec: RunSpec, count: int, device: str) -> Iterator[dict[str, Any]]:
    """Placements and sequences at a time, the best first."""
    for placement in (spec.placement,) if spec.placement else ("replicate", "shard", "split"):
        for size in _MICRO_BATCHES if device == "cuda" else (1,):
            yield {"placement": placement, "micro_batch": size, "global_batch": size * count}


def _scoring_spec(spec: RunSpec, seq_len: int) -> RunSpec:
    """A run's spec without what is of training alone."""
    return changed(
        spec,
        {
            "seq_len": seq_len, "steps": 1, "epochs": None, "micro_batch": None, "pack": False, "graphs": False,
            "trackers": (), "adapter": None, "run": None, "zero.stage": 0, "zero.offload": "none",
            "optim.name": None, "split.schedule": None, "split.offload_layers": None, "compute": None, "liger": False,
            "train.checkpointing": True, "train.verify_steps": 0, "train.answers": 0,
        },
    )  # fmt: skip
