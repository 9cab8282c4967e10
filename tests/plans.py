"""Plans for tests: any known model with random weights, on any machine."""

from typing import Any

from qdist.core.machine.cluster import Cluster, Gpu, hypothetical
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.plan import DataFacts, Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import GIB

CPU = Cluster(device="cpu", gpus=(), cpu_count=8, memory_bytes=256 * GIB, memory_free_bytes=250 * GIB)


def planned(
    model: str,
    cluster: Cluster,
    settings: dict[str, Any] | None = None,
    *,
    data: DataFacts | None = None,
    has_liger: bool = True,
    vocab_rows: int | None = None,
    new_token_ids: tuple[int, ...] = (),
    **more: Any,
) -> Plan:
    """The plan of a model on a machine; `settings` are dotted."""
    config = config_of(model)
    return make_plan(
        resolve({"steps": 5, "model": model}, nest(settings or {})),
        Source(kind="dummy", path="", config=config, tokenizer="", vocab_rows=vocab_rows, new_token_ids=new_token_ids),
        from_config(config, name=model),
        cluster,
        data,
        has_liger=has_liger,
        **more,
    )


def gpus(count: int, gib: float) -> Cluster:
    """A machine of empty GPUs."""
    return hypothetical(count, int(gib * GIB))


def machine(*gibs: int) -> Cluster:
    """A machine of uneven H200s."""
    cards = tuple(
        Gpu(index=index, name="NVIDIA H200", total_bytes=gib * GIB, free_bytes=gib * GIB)
        for index, gib in enumerate(gibs)
    )
    return Cluster(device="cuda", gpus=cards, cpu_count=8, memory_bytes=256 * GIB, memory_free_bytes=256 * GIB)
