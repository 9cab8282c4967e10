"""`qdist models`: list the models that have a short name, with their size and their place on the Hub."""

import click
import msgspec

from qdist.core.errors import ModelError
from qdist.core.model.aliases import ALIASES, folded
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.families.family import Alias
from qdist.core.model.storage import Packing
from qdist.core.planning.disk import packed_bytes
from qdist.core.text import format_bytes, format_count
from qdist.host.sources.models import EMBEDDED_PACKAGE
from qdist.host.terminal import say, say_json


class Known(msgspec.Struct, frozen=True):
    """One model in the list."""

    name: str
    parameters: int
    packed_bytes: int
    """Bytes on disk at 4-bit nf4 with double quantization, embeddings in 16 bits."""
    place: str
    """Hub id, or the PyPI package that contains it."""
    trainable: bool
    """False if transformers has no class for it: such a model can only be planned."""


@click.command()
@click.argument("word", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON list, with parameters and bytes as numbers.")
def models(word: str | None, as_json: bool) -> None:
    """List the models that --model knows by a short name; with WORD, those that have it in a name.

    Any other model that transformers has a class for is named by its hub id or folder.
    """
    listed = [known(name, alias) for name, alias in ALIASES.items()]
    listed = [each for each in listed if folded(word or "") in folded(f"{each.name} {each.place}")]
    if not listed:
        raise ModelError(f"no short name has {word!r} in it", try_="qdist models, or the model's hub id or folder")
    if as_json:
        say_json(msgspec.json.format(msgspec.json.encode(listed), indent=2))
    else:
        width = max(15, *(len(each.name) for each in listed))
        head = f"{'name':{width}}  parameters     4 bits  from"
        say("\n".join([head, *(_row(each, width) for each in listed)]))


def known(name: str, alias: Alias) -> Known:
    """List entry of an alias."""
    facts = from_config(alias.config, name=name)
    return Known(
        name=name,
        parameters=facts.parameters,
        packed_bytes=packed_bytes(facts, Packing(bits=4)),
        place=alias.hub_id or f"PyPI package {EMBEDDED_PACKAGE.replace('_', '-')}",
        trainable=not FAMILIES[alias.config["model_type"]].own_code,
    )


def _row(model: Known, width: int) -> str:
    own_code = "" if model.trainable else "  (trained with --trust-remote-code)"
    sizes = f"{format_count(model.parameters):>10}  {format_bytes(model.packed_bytes):>9}"
    return f"{model.name:{width}}  {sizes}  {model.place}{own_code}"
