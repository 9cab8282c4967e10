"""`qdist plan`: what launch would do, for this machine or another, without torch and without the weights."""

from importlib.util import find_spec
from typing import Any

import click
import msgspec

from qdist.cli.planned import plan_lines, shown
from qdist.core.cards import memory_of
from qdist.core.cluster import UNNAMED, Cluster, hypothetical
from qdist.core.errors import SpecError
from qdist.core.plan import Source
from qdist.core.planner import make_plan
from qdist.core.spec import nest, parse_assignment, resolve
from qdist.core.units import format_bytes, parse_bytes
from qdist.host import lessons, probe, templates
from qdist.host.checkpoints import gptq_of
from qdist.host.sources import known_shape


@click.command()
@click.argument("recipe", required=False)
@click.option("--model", help="Alias, folder with config.json, GGUF file or hub id.")
@click.option("--bits", help="4, 8 or 16; a GPTQ checkpoint's own 2, 3, 4 or 8.")
@click.option("--method", help="qlora; gptq-lora or qa-lora on a GPTQ checkpoint.")
@click.option("--gpus", type=click.IntRange(min=1), help="How many GPUs.")
@click.option("--gpu-memory", help="Memory of each, such as 48GiB; this machine's GPUs by default.")
@click.option("--gpu-name", help="The card, such as 'RTX 4090', where it is not this machine's.")
@click.option("--host-memory", help="Host memory of the machine; where it is not this one, 64GiB or twice its GPUs'.")
@click.option("--placement", help="replicate, shard or split; the fastest that fits by default.")
@click.option("--gpus-per-group", metavar="N", help="GPUs that hold one backbone between them; auto by default.")
@click.option("--max-memory", help="Cap on each GPU, such as 24GiB.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other setting, such as seq_len=1024."
)
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan(
    recipe: str | None,
    gpu_memory: str | None,
    gpu_name: str | None,
    host_memory: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Show how a run would lie in memory and how fast it would go; exit 2 when it does not fit."""
    given = nest(
        {key: value for key, value in flags.items() if value is not None} | dict(map(parse_assignment, assignments))
    )
    spec = resolve(*([templates.read_recipe(recipe)] if recipe else []), given)
    if not spec.model:
        raise SpecError("no model was named", try_="--model llama-65b")
    # Epochs cannot be counted without the data, and steps have no weight.
    spec = spec if spec.steps else msgspec.structs.replace(spec, steps=1, epochs=None)
    config, facts, of_another = known_shape(spec.model)
    described = bool(gpu_memory or gpu_name)
    cluster = _machine(spec.gpus or 1, gpu_memory, gpu_name, host_memory)
    # What another machine has installed is for the user to say.
    has_liger = find_spec("liger_kernel") is not None or (spec.liger is True and described)
    learnt = None if described else lessons.correction_for(cluster, world_size=spec.gpus, bits=spec.bits)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=gptq_of(spec, config))
    decided = make_plan(spec, source, facts, cluster, None, has_liger=has_liger, correction=learnt)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(decided), indent=2).decode())
        return
    plain = decided.device == "cuda" and not decided.liger and spec.liger is None
    notes = [of_another] if of_another else []
    notes += ["liger-kernel is not installed here: --set liger=true plans with its kernels"] if plain else []
    if described and not host_memory and decided.offloaded_layers:
        notes.append(f"the machine is taken to have {format_bytes(cluster.memory_bytes)} of host memory: --host-memory")
    lines = plan_lines(decided, notes=tuple(notes))
    click.echo(shown([line for line in lines if not line.startswith("steps")]))


def _machine(gpus: int, gpu_memory: str | None, gpu_name: str | None, host_memory: str | None) -> Cluster:
    """The machine that was described, or this one; with other host memory if that was named."""
    host_bytes = parse_bytes(host_memory) if host_memory else None
    if not (gpu_memory or gpu_name):
        here = probe.cluster()
        return msgspec.structs.replace(here, memory_bytes=host_bytes) if host_bytes else here
    known_bytes = memory_of(gpu_name) if gpu_name else 0
    each = parse_bytes(gpu_memory) if gpu_memory else known_bytes
    return hypothetical(gpus, each, name=gpu_name or UNNAMED, host_memory_bytes=host_bytes)
