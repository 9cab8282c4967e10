"""Opens a run or a model for use: `model, tokenizer = qdist.load(RUN_OR_MODEL)`."""

from pathlib import Path
from typing import Any

import torch

from qdist.core.errors import RunError, SpecError
from qdist.core.plan import Plan, Source
from qdist.host.rundir import RunDir
from qdist.runtime.methods.backbone import DTYPES, load_backbone, load_plain


def load(run_or_model: str | Path, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A transformers model ready to generate, and its tokenizer, or None where there is none.

    run_or_model: a run directory (its quantized backbone with its adapter on), or any model that `qdist launch`
    takes: an alias, a folder, a GGUF file, a hub id.
    dtype: auto, bfloat16, float16 or float32. auto is what the run computed in, or what the model is stored in.
    device: such as cuda:0 or cpu; by default the first GPU, else the CPU.

    Raises RunError for a run without an adapter, ModelError for a model that cannot be found.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise SpecError(f"dtype cannot be {dtype!r}", try_="auto, bfloat16, float16 or float32")
    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    run = RunDir(run_or_model)
    if run.exists():
        return _load_run(run, dtype, place)
    return _load_model(str(run_or_model), dtype, place)


def load_tokenizer(source: Source) -> Any:
    """The repaired tokenizer of a run, or None for random weights."""
    if not source.tokenizer:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=True)


def load_run_backbone(plan: Plan, dtype: torch.dtype, device: torch.device) -> Any:
    """The quantized backbone of a run, without its adapter."""
    return load_backbone(
        plan.source,
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=dtype,
        device=device,
        linear_names=plan.facts.linear_names,
    )


def _load_run(run: RunDir, dtype: str, device: torch.device) -> tuple[Any, Any]:
    from peft import PeftModel

    from qdist.runtime.special_tokens import align_config

    plan = run.plan()
    if not run.adapter.is_dir():
        raise RunError(f"{run.path} has no adapter yet", try_=f"qdist gather {run.path}")
    chosen = DTYPES[plan.compute_dtype if dtype == "auto" else dtype]
    model = PeftModel.from_pretrained(load_run_backbone(plan, chosen, device), str(run.adapter))
    model.eval()
    tokenizer = load_tokenizer(plan.source)
    if tokenizer is not None:
        align_config(model, tokenizer)
    model.config.use_cache = True
    return model, tokenizer


def _load_model(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from qdist.host.sources import locate
    from qdist.runtime.materialize import materialize
    from qdist.runtime.special_tokens import align_config, repair

    folder = materialize(locate(name))
    model = load_plain(str(folder), dtype=dtype if dtype == "auto" else DTYPES[dtype], device=device).eval()
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return model, None
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    repair(tokenizer, model.config.to_dict())
    align_config(model, tokenizer)
    return model, tokenizer
