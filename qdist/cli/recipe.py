"""`qdist convert recipe`: another program's recipe as one of ours."""

from pathlib import Path

import click

from qdist.core.spec.recipes.convert import (
    PROGRAMS,
    Converted,
    ProgramName,
    convert,
    program_of,
    require_honoured,
    to_text,
)
from qdist.core.text import command, counted, first_few
from qdist.host.files import file_to_write, write_out
from qdist.host.sources.recipes import data_sets_beside, read_recipe
from qdist.host.terminal import say


@click.command("recipe")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "program", type=click.Choice(list(PROGRAMS)), help="Whose recipe it is.  [default: told by its keys]"
)
@click.option("--out", metavar="FILE", help="TOML file to write; must not be there yet.  [default: standard output]")
@click.option(
    "--gpus", type=click.IntRange(1), metavar="N", help="GPUs that it ran on, each with its own batch.  [default: 1]"
)
@click.option(
    "--steps", type=click.IntRange(1), metavar="N", help="Optimizer steps of the run, for what is a share of them."
)
@click.option("--lossy", is_flag=True, help="Leave out what cannot be honoured, though training differs by it.")
def recipe(
    file: Path, program: ProgramName | None, out: str | None, gpus: int | None, steps: int | None, lossy: bool
) -> None:
    """Turn FILE, a recipe of Axolotl, LLaMA-Factory or TRL for quantized LoRA, into a recipe for `qdist launch`.

    Every key that cannot be honoured is named with its line and the reason, on standard error and in the file. One that
    training depends on is refused.
    """
    place = Path(file_to_write(out)) if out is not None else None
    given = read_recipe(file)
    found = convert(
        given,
        program or program_of(given, name=file.name),
        name=file.name,
        gpus=gpus,
        steps=steps,
        beside=data_sets_beside(file, given),
    )
    _tell(found)
    if not lossy:
        require_honoured(found)
    if place is None:
        say(to_text(found).rstrip("\n"))
    else:
        write_out(place, to_text(found))
        say(f"{place}: {counted(len(found.settings), 'setting')} of a recipe of {found.title}")
        say(f"  try: {command('plan', place)}")


def _tell(found: Converted) -> None:
    """Say on standard error what is not honoured, or not as it was."""
    for each in found.of("lost"):
        say(f"lost     {each}", err=True)
    for each in found.of("altered"):
        say(f"note     {each}", err=True)
    if needless := found.of("anyhow"):
        keys = first_few([each.key for each in needless], most=6)
        say(f"note     {counted(len(needless), 'key')} without effect on what is learned: {keys}", err=True)
