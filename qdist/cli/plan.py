"""`qdist plan`: what launch would do, for this machine or another, without torch and without the weights."""

from importlib.util import find_spec
from typing import Any

import click
import msgspec

from qdist.cli.planned import plan_lines
from qdist.core.cards import memory_of
from qdist.core.cluster import UNNAMED, Cluster, hypothetical
from qdist.core.errors import SpecError
from qdist.core.plan import Source
from qdist.core.planner import make_plan
from qdist.core.spec import nest, parse_assignment, resolve
from qdist.core.units import parse_bytes
from qdist.host import probe, templates
from qdist.host.sources import shape


@click.command()
@click.argument("recipe", required=False)
@click.option("--model", help="Alias, or a folder with config.json.")
@click.option("--bits", help="4, 8 or 16.")
@click.option("--gpus", type=click.IntRange(min=1), help="How many GPUs.")
@click.option("--gpu-memory", help="Memory of each, such as 48GiB; this machine's GPUs by default.")
@click.option("--gpu-name", help="The card, such as 'RTX 4090', where it is not this machine's.")
@click.option("--placement", help="replicate, shard or split; the fastest that fits by default.")
@click.option("--gpus-per-group", type=click.IntRange(min=1), help="GPUs that hold one backbone between them.")
@click.option("--max-memory", help="Cap on each GPU, such as 24GiB.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other setting, such as seq_len=1024."
)
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan(
    recipe: str | None,
    gpu_memory: str | None,
    gpu_name: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Show how a run would lie in memory and how fast it would go; exit 1 when it does not fit."""
    given = nest(
        {key: value for key, value in flags.items() if value is not None} | dict(map(parse_assignment, assignments))
    )
    spec = resolve(*([templates.read_recipe(recipe)] if recipe else []), given)
    if not spec.model:
        raise SpecError("no model was named", try_="--model llama-65b")
    # Epochs cannot be counted without the data, and steps have no weight.
    spec = spec if spec.steps else msgspec.structs.replace(spec, steps=1, epochs=None)
    config, facts = shape(spec.model)
    cluster = _machine(spec.gpus or 1, gpu_memory, gpu_name)
    # What another machine has installed is for the user to say.
    has_liger = find_spec("liger_kernel") is not None or (spec.liger is True and bool(gpu_memory or gpu_name))
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    decided = make_plan(spec, source, facts, cluster, None, has_liger=has_liger)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(decided), indent=2).decode())
        return
    plain = decided.device == "cuda" and not decided.liger and spec.liger is None
    notes = ("liger-kernel is not installed here: --set liger=true plans with its kernels",) if plain else ()
    click.echo("\n".join(line for line in plan_lines(decided, notes=notes) if not line.startswith("steps")))


def _machine(gpus: int, gpu_memory: str | None, gpu_name: str | None) -> Cluster:
    """The machine that was described, or this one."""
    if not (gpu_memory or gpu_name):
        return probe.cluster()
    known_bytes = memory_of(gpu_name) if gpu_name else 0
    return hypothetical(gpus, parse_bytes(gpu_memory) if gpu_memory else known_bytes, name=gpu_name or UNNAMED)
