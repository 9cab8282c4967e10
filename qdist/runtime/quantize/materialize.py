"""Turns a model into a local folder that transformers opens: converts GGUF and downloads hub ids, once each."""

import contextlib
import os
import shutil
from pathlib import Path

from qdist.core.errors import ModelError
from qdist.host.files import cache_dir, locked, publish_folder
from qdist.host.opening import told
from qdist.host.run.rundir import RunDir
from qdist.host.sources.cache import converted_folder
from qdist.host.sources.models import Located, locate
from qdist.host.sources.targets import require_readable
from qdist.host.terminal import say
from qdist.runtime.model.own_code import require_class


def materialize(located: Located, *, trusted: bool = False) -> Path:
    """The local folder of a located model. Concurrent processes wait for the first one's conversion.

    trusted: whether its own code may be run, where transformers has no class for it; this process has then run it.
    """
    require_readable(located, name=located.path, trusted=trusted)
    if located.kind == "gguf":
        return _converted(Path(located.path))
    folder = _download(located.path, trusted=trusted) if located.kind == "hub" else Path(located.path)
    require_class(folder, located.path, trusted=trusted)
    return folder


def trust(name: str) -> None:
    """Run a model's own code, if transformers has no class for it; this process may then open the model.

    name: as the user has it; of a run nothing is to be done, since its plan says what is trusted.
    """
    if not RunDir(name).exists():
        materialize(locate(name), trusted=True)


def _converted(file: Path) -> Path:
    folder = converted_folder(file)
    if not folder.is_dir():
        cache_dir(folder.parent.name)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bfloat16 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qdist.runtime.formats.recorded_sums import keep_computed_sums

    say(f"converting {file.name}, once: the result is cached", err=True)
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    with (
        told(f"{file} cannot be converted", ModelError, try_="a GGUF file of a Llama, Mistral or Qwen model"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),  # a progress bar of 272 lines
    ):
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    # transformers keeps calling the model GGUF-quantized and refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    keep_computed_sums(beside)
    publish_folder(beside, folder)


def _download(hub_id: str, *, trusted: bool) -> Path:
    from huggingface_hub import snapshot_download

    other = "the path of a run or of a model's folder, or HF_TOKEN for a gated model"
    with told(f"{hub_id} cannot be fetched from the hub", ModelError, try_=other):
        told_of = Path(snapshot_download(hub_id, allow_patterns=["config.json"]))
        if not trusted:
            require_class(told_of, hub_id, trusted=False)
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trusted else [])]
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):  # older models have torch's own files alone
            snapshot_download(hub_id, allow_patterns=["*.bin"])
        return folder
