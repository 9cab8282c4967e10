"""Reads recipes of other programs, YAML or JSON, with the line of each key, and the data sets that they name."""

from pathlib import Path
from typing import Any

from qdist.core.errors import SpecError
from qdist.core.spec.recipes.convert import Given
from qdist.core.spec.recipes.llama_factory import DATA_SETS
from qdist.core.text import counted
from qdist.host.opening import read_object, read_text, told

_LIST = "dataset_info.json"
_MOST_BYTES = 1 << 20


def read_recipe(path: Path) -> dict[str, Given]:
    """The keys of a recipe, with their values and lines.

    Raises SpecError for what is not YAML or JSON, or not keys with values, and for a key that is there twice.
    """
    text = read_text(path, SpecError, try_="the path of a YAML or JSON recipe")
    if len(text) > _MOST_BYTES:
        raise SpecError(f"{path} has {counted(len(text), 'character')}, and a recipe {_MOST_BYTES:,} at most")
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # YAML has JSON within it, but for tabs
    with told(f"{path} is not YAML", SpecError, try_="a recipe of Axolotl, LLaMA-Factory or TRL"):
        return _keys_of(text, path)


def _keys_of(text: str, path: Path) -> dict[str, Given]:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise SpecError(f"{path} does not hold keys with values", try_="a YAML or JSON recipe")
        loader.flatten_mapping(node)
        found: dict[str, Given] = {}
        for key_node, value_node in node.value:
            key, line = str(loader.construct_object(key_node, deep=True)), key_node.start_mark.line + 1
            if key in found:
                raise SpecError(f"{path} has {key} in line {found[key].line} and in line {line}", try_="one of them")
            found[key] = Given(loader.construct_object(value_node, deep=True), line)
        return found
    finally:
        loader.dispose()


def data_sets_beside(path: Path, recipe: dict[str, Given]) -> dict[str, Any]:
    """LLaMA-Factory's list of data sets, and the folder where it was found; empty if it is not there.

    path: of the recipe; its folder is looked into after the working folder.
    """
    stated = recipe.get("dataset_dir")
    own = Path(str(stated.value if stated else "data"))
    folder = next((each for each in (own, path.parent / own) if (each / _LIST).is_file()), None)
    if folder is None:
        return {}
    return {DATA_SETS: read_object(folder / _LIST, SpecError), "dataset_dir": str(folder)}
