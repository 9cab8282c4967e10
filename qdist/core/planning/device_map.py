"""Where does each module of a planned model lie, in the words of transformers' `device_map`?"""

from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Plan


def device_map(plan: Plan) -> dict[str, int | str]:
    """The device of each module for `from_pretrained(..., device_map=...)`, of the first group of GPUs.

    GPUs go by their number, offloaded layers and those of CPU ranks by 'cpu'. Raises SpecError for a sharded backbone.
    """
    if refused := layout_of(plan).unmapped():
        raise refused
    modules = plan.facts.modules
    gpus = [gpu for rank in plan.ranks if rank.group == 0 for gpu in rank.gpus]
    layer_map = plan.layer_map or (0,) * plan.facts.layer_count
    devices: list[int | str] = [gpus[position] if gpus else "cpu" for position in layer_map]
    found = dict.fromkeys(modules.until_layers, devices[0])
    found |= {
        f"{modules.layers}.{layer}": "cpu" if layer in plan.offloaded_layers else device
        for layer, device in enumerate(devices)
    }
    return found | dict.fromkeys((modules.final_norm, modules.head), devices[-1])
