"""`qdist plan`: what launch would do, for this machine or another, without torch and without the weights."""

from typing import Any

import click
import msgspec

from qdist.cli.flags import SettingsCommand, setting_flags
from qdist.cli.views.plan import plan_lines, shown
from qdist.core.planning.device_map import device_map
from qdist.core.spec.lookup import COMMON
from qdist.core.text import format_bytes
from qdist.host.launch.planning import PlanRequest, machine_of, planned
from qdist.host.machine import probe
from qdist.host.sources.models import known_shape
from qdist.host.terminal import say, say_json

_SETTINGS = ("model", "trust_remote_code", "bits", "method", "gpus", "placement", "gpus_per_group", "max_memory")
"""Settings with a flag of their own, besides the common ones."""


@click.command(cls=SettingsCommand)
@click.argument("recipe", required=False)
@setting_flags(*_SETTINGS, *COMMON)
@click.option("--gpu-memory", help="Memory of each: 48GiB, or '2 x 24GiB + 48GiB'; by default that of the card.")
@click.option("--gpu-name", help="The card where it is not this machine's: 'RTX 4090', or 'RTX 3090 + RTX 4090'.")
@click.option("--host-memory", help="Host memory of the machine; where it is not this one, 64GiB or twice its GPUs'.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE",
    help="Any setting of `qdist settings`, such as lora.alpha=32.",
)  # fmt: skip
@click.option("--json", "form", flag_value="json", help="The whole plan as JSON.")
@click.option("--device-map", "form", flag_value="device-map", help="As JSON where transformers is to put each module.")
def plan(form: str | None, **asked: Any) -> None:
    """Show how a run would lie in memory and how fast it would go; exit 2 when it does not fit."""
    request = requested(**asked)
    decided = planned(request)
    if form:
        shape = decided if form == "json" else device_map(decided)
        say_json(msgspec.json.format(msgspec.json.encode(shape), indent=2))
        return
    plain = decided.device == "cuda" and not decided.liger and decided.spec.liger is None
    of_another = known_shape(decided.spec.model, decided.spec.trust_remote_code).note
    notes = [of_another] if of_another else []
    notes += ["liger-kernel is not installed here: --set liger=true plans with its kernels"] if plain else []
    if request.described and request.host_memory is None and decided.offloaded_layers:
        host = machine_of(request, decided.spec.gpus, probe.cluster).memory_bytes
        notes.append(f"the machine is taken to have {format_bytes(host)} of host memory: --host-memory")
    lines = plan_lines(decided, notes=tuple(notes))
    say(shown([line for line in lines if not line.startswith("steps")]))


def requested(**asked: Any) -> PlanRequest:
    """The request made by the flags of `qdist plan`."""
    own = {name: asked.pop(name) for name in msgspec.structs.asdict(PlanRequest()) if name in asked}
    return PlanRequest(settings=asked, **own)
