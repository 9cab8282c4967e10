"""Runs the code that a model brings along, once its user has asked for that; the only place that does.

What it defines is registered with transformers, which then opens the model as one of its own. So no other call allows
code to be run, and a process that did not come through here refuses the model.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qdist.core.errors import ModelError
from qdist.core.model.families import own_code
from qdist.core.planning.plan import Source
from qdist.host.opening import told
from qdist.host.sources.models import read_json

_TOKENIZER = "tokenizer_config.json"


def require_class(folder: Path, name: str, *, trusted: bool) -> str:
    """Make sure that transformers has a class for a model folder's config.json.

    name: what the user calls the model. trusted: whether its own code may be run; once this process has, it is.
    Returns the folder whose code was run for that; empty if none was. Raises ModelError.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if not needs_code(config) or (not trusted and config["model_type"] in _registered()):
        return ""
    if not trusted:
        raise own_code(name)
    run_code_of(folder)
    return str(folder)


def _registered() -> Collection[str]:
    """Model types that transformers has a configuration for in this process."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING.keys()


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself has no class for a model that brings its own. config: of its config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING_NAMES


def run_code_for(source: Source) -> None:
    """Run the code that a run's plan names, if any: its user has asked for that when the run was planned."""
    if source.own_code and Path(source.own_code).is_dir():
        require_class(Path(source.own_code), source.own_code, trusted=True)


def run_code_of(folder: Path) -> None:
    """Register the configuration, model and tokenizer that a folder's code defines. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, beside = read_json(folder / "config.json"), folder / _TOKENIZER
    names = config["auto_map"]
    with told(f"the code in {folder} does not run", ModelError, try_="a model that transformers has a class for"):
        own = _defined(folder, names["AutoConfig"], "AutoConfig")
        model = _defined(folder, names["AutoModelForCausalLM"], "AutoModelForCausalLM")
        AutoConfig.register(config["model_type"], own, exist_ok=True)
        AutoModelForCausalLM.register(own, model, exist_ok=True)
        if name := _tokenizer_name(read_json(beside) if beside.is_file() else {}):
            AutoTokenizer.register(own, _defined(folder, name, "AutoTokenizer"), exist_ok=True)


def _defined(folder: Path, name: str, auto: str) -> Any:
    """A class of a folder's code, which is saved along with what is made of it. name: 'module.Class'."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    found = get_class_from_dynamic_module(name, str(folder), local_files_only=True)
    found.register_for_auto_class(auto)
    return found


def _tokenizer_name(config: Mapping[str, Any]) -> str:
    """The tokenizer's class in its own code, the fast one if there are two; empty if transformers has it."""
    names = config.get("auto_map") or {}
    listed = names.get("AutoTokenizer") if isinstance(names, Mapping) else names
    of_both = [listed] if isinstance(listed, str) else list(listed or ())
    return next((name for name in reversed(of_both) if name), "")
