"""Can a run train on what a model's folder says it is? Read from its small files, without torch and without weights."""

from collections.abc import Mapping
from pathlib import Path

from qdist.core.errors import ModelError
from qdist.core.gptq import Gptq, method_of, of_run, stated_by, to_config
from qdist.core.quoting import command
from qdist.core.spec import RunSpec
from qdist.host.opening import converted
from qdist.host.sources import read_json

PICKLED = (".bin", ".pt", ".pth")
"""Endings of torch's own files."""
INDEX, QUANTIZE_CONFIG = "model.safetensors.index.json", "quantize_config.json"


def gptq_of(spec: RunSpec, config: Mapping[str, object], folder: Path | None = None) -> Gptq | None:
    """How the backbone of a run is quantized by GPTQ; None where it is not.

    config: the content of the model's config.json.
    folder: where the model lies; by default where its name says, and an alias lies nowhere: its weights are random.
    Raises ModelError for a folder that is no GPTQ checkpoint, contradicts itself or lacks files; SpecError where the
    method and the model do not go together.
    """
    folder = folder or Path(spec.model).expanduser()
    if spec.load_format == "dummy" or not folder.is_dir():
        return of_run(spec, config)
    folder = folder.resolve()
    found = stated(folder)
    if of_run(spec, {**config, "quantization_config": to_config(found)} if found else config) is None:
        return None
    if found is None:
        raise _not_gptq(spec.model, config)
    _require_files(folder)
    return found


def _not_gptq(name: str, config: Mapping[str, object]) -> ModelError:
    """What to quantize instead: the model itself, or what it was made from where it is packed otherwise already."""
    stored = config.get("quantization_config")
    if isinstance(stored, Mapping) and stored:
        return ModelError(
            f"{name} is quantized with {method_of(stored) or 'bitsandbytes'} and is no GPTQ checkpoint",
            try_=f"the 16-bit model that it was made from: {_quantizing('MODEL')}",
        )
    return ModelError(f"{name} is no GPTQ checkpoint", try_=f"{_quantizing(name)}, or --method qlora")


def _quantizing(model: str) -> str:
    return command("quantize", model, "--method", "gptq", "--data", "DATA", "--out", "DIR")


def stated(folder: Path) -> Gptq | None:
    """What the two configurations in a folder say of GPTQ; see `stated_by`."""
    config, beside = read_json(folder / "config.json"), folder / QUANTIZE_CONFIG
    return stated_by(config, read_json(beside) if beside.is_file() else None, name=str(folder))


def weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as a folder's index has it; None where there is none."""
    index = folder / INDEX
    if not index.is_file():
        return None
    again = "download the model again"
    found = read_json(index).get("weight_map")
    if found is None:
        raise ModelError(f"{index} says of no tensor where it is", try_=again)
    return converted(found, dict[str, str], f"{index}: weight_map", ModelError, try_=again)


def safetensors_of(folder: Path) -> tuple[str, ...]:
    """Names of the files that a folder's index names, or that lie there where it has none."""
    indexed = weight_map(folder)
    if indexed is None:
        return tuple(sorted(file.name for file in folder.glob("*.safetensors")))
    return tuple(sorted(set(indexed.values())))


def _require_files(folder: Path) -> None:
    names = safetensors_of(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX} names: {missing[0]}"
            + (" and others" if len(missing) > 1 else ""),
            try_="download the checkpoint again, or qdist quantize the model that it was made from",
        )
