"""Which global batch makes what the network takes of a step small, and what is said of that?"""

from collections.abc import Iterator
from math import ceil, lcm

import msgspec

from qdist.core.machine.cluster import Cluster
from qdist.core.machine.world import used_gpus
from qdist.core.planning.candidates import Candidate, arrange
from qdist.core.planning.context import PlanningContext
from qdist.core.planning.fill import MicroBatch
from qdist.core.planning.layer_map import least
from qdist.core.planning.network import WORTH_SAYING
from qdist.core.planning.plan import DataFacts
from qdist.core.spec.run_spec import USUAL_BATCH, RunSpec
from qdist.core.text import counted

_MOST_TIMES = 4096
"""Multiple of the batch up to which a larger one is looked for."""


def with_batch(spec: RunSpec, batch: int) -> RunSpec:
    """A spec with a number of samples a step."""
    return msgspec.structs.replace(spec, global_batch=batch)


def uncounted(data: DataFacts | None, batch: int) -> DataFacts | None:
    """The data for another batch than they were counted for: how full its micro-batches are is then estimated."""
    if data is None or batch == USUAL_BATCH:
        return data
    return msgspec.structs.replace(data, fullest=(), fills=())


def first_batch(spec: RunSpec, counts: tuple[int, ...]) -> int:
    """The usual batch, on several nodes rounded up to what their ranks share. counts: of GPUs of each node."""
    if len(counts) == 1:
        return USUAL_BATCH
    size = spec.gpus_per_group or 1
    ranks = sum(used_gpus(sum(count // size for count in counts), size, counts))
    unit = ranks * (spec.micro_batch or 1)
    return -(-USUAL_BATCH // unit) * unit


def cheap_batch(setting: PlanningContext, winner: Candidate) -> int:
    """The least batch with which the network takes at most 5 % of a step of the same layout.

    0 where it takes no more already, where no batch within an epoch helps, or the device's speed is unknown.
    """
    if winner.network_share <= WORTH_SAYING:
        return 0
    each = winner.layout.data_parallel * (1 if winner.packed else winner.micro_batch)
    unit = lcm(each, sum(setting.nodes))  # for any other layout of the same GPUs as well

    def is_cheap(times: int) -> bool:
        return _with(setting, winner, times * unit).network_share <= WORTH_SAYING

    first = ceil(setting.spec.batch / unit)
    most = setting.data.epoch // unit if setting.data else first * _MOST_TIMES
    times = least(is_cheap, first, max(first, min(most, first * _MOST_TIMES)))
    return times * unit if is_cheap(times) else 0


def _with(setting: PlanningContext, winner: Candidate, batch: int) -> Candidate:
    """The same candidate with another batch."""
    own = setting._replace(spec=with_batch(setting.spec, batch), data=uncounted(setting.data, batch))
    size = MicroBatch(winner.micro_batch, winner.packed)
    return arrange(own, winner.layout, size, winner.checkpointed, len(winner.offloaded))


def network_notes(setting: PlanningContext, winner: Candidate, cluster: Cluster, *, auto: bool) -> Iterator[str]:
    """What the network costs and what would make it cheap, and which GPUs are idle. auto: who chose the batch."""
    if not setting.nodes:
        return
    share, batch = f"{100 * winner.network_share:.2g} %", setting.spec.batch
    if setting.network.source == "assumed":
        yield "no network was given: 10 Gbit/s and 0.1 ms between nodes are assumed; qdist doctor --hosts measures them"
    if auto and winner.seconds:
        yield f"global_batch={batch}: the network takes {share} of a step"
    elif winner.network_share > WORTH_SAYING:
        cheap = cheap_batch(setting, winner)
        would = f"global_batch={cheap} would bring it under 5 %, and global_batch=auto takes one that does"
        yield f"the network takes {share} of a step; {would if cheap else 'no larger global_batch brings it under 5 %'}"
    if setting.world(winner.layout).spanning:
        size, nodes = winner.layout.gpus_per_group, len(setting.nodes)
        yield f"groups of {size} span the {nodes} nodes, and a node that is lost takes its groups with it"
    yield from _idle(setting, winner, cluster)


def _idle(setting: PlanningContext, winner: Candidate, cluster: Cluster) -> Iterator[str]:
    size = winner.layout.gpus_per_group
    unit = "GPU" if setting.rooms is not None else "CPU rank"
    used = used_gpus(winner.layout.groups, size, setting.nodes)
    for machine, count, own in zip(cluster.nodes, setting.nodes, used, strict=True):
        if left := count - own:
            yield f"{counted(left, unit)} of {machine.name} idle: groups of {size} do not go into its {count}"
