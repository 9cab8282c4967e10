"""`qdist plan`: what launch would do, for this machine or another, without torch and without the weights."""

from typing import Any

import click
import msgspec

from qdist.cli.planned import plan_lines
from qdist.core.cluster import hypothetical
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
@click.option("--max-memory", help="Cap on each GPU, such as 24GiB.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other setting, such as seq_len=1024."
)
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan(recipe: str | None, gpu_memory: str | None, assignments: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Show how a run would lie in memory; exit 1 when it does not fit."""
    given = nest(
        {key: value for key, value in flags.items() if value is not None} | dict(map(parse_assignment, assignments))
    )
    spec = resolve(*([templates.read_recipe(recipe)] if recipe else []), given)
    if not spec.model:
        raise SpecError("no model was named", try_="--model llama-65b")
    # Epochs cannot be counted without the data, and steps have no weight.
    spec = spec if spec.steps else msgspec.structs.replace(spec, steps=1, epochs=None)
    config, facts = shape(spec.model)
    cluster = hypothetical(spec.gpus or 1, parse_bytes(gpu_memory)) if gpu_memory else probe.cluster()
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    decided = make_plan(spec, source, facts, cluster, None, has_liger=False)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(decided), indent=2).decode())
        return
    click.echo("\n".join(line for line in plan_lines(decided) if not line.startswith("steps")))
