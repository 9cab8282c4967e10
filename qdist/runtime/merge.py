"""Folds a run's adapter into a 16-bit model, onto the weights it was trained on or the original ones."""

import argparse
import gc
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.core.errors import QdistError, RunError
from qdist.core.plan import Plan
from qdist.core.residence import footprint
from qdist.host.files import publish_folder
from qdist.host.rundir import RunDir
from qdist.runtime.forward import Forward
from qdist.runtime.load import load_run, residence_of
from qdist.runtime.methods.backbone import DTYPES, load_plain
from qdist.runtime.methods.packed import PACKING, PackedLinear
from qdist.runtime.originals import Originals, find_originals
from qdist.runtime.placements.residence import choose, move
from qdist.runtime.samples import Samples, read_samples
from qdist.runtime.special_tokens import align_config


class Losses(NamedTuple):
    """Held-out losses; NaN where the run holds nothing out, None where there is no such backbone."""

    adapter: float
    dequantized: float
    original: float | None


def merge(run: RunDir, out: Path, *, onto: str, dtype: torch.dtype) -> Losses:
    """Write a merged model that plain transformers loads; measure what merging onto either backbone costs.

    The sum W + alpha / r * B A is taken in float32, a matrix at a time, and rounded once. The merged model is whole in
    host memory, and evaluated on the GPUs as far as it fits.

    Raises RunError where the adapter is to be merged onto weights that are not there any more, or never were.
    """
    plan = run.plan()
    originals = find_originals(plan.source)
    if onto == "original" and isinstance(originals, str):
        raise RunError(originals, try_="--onto dequantized")
    compute = DTYPES[plan.compute_dtype]
    tokens = plan.micro_batch * plan.seq_len
    residence = residence_of(plan, compute, tokens=tokens, scored=tokens)
    print(residence, file=sys.stderr, flush=True)
    losses: dict[str, float] = {}
    for backbone, tensors in (("dequantized", None), ("original", originals)):
        if isinstance(tensors, str):
            continue
        model, tokenizer = load_run(run, compute, residence)  # anew: it leaves the GPUs to the merged model
        samples = read_samples(plan, pad_id=tokenizer.pad_token_id if tokenizer else 0)
        if "adapter" not in losses:
            losses["adapter"] = _held_out(model, samples, compute)
        plain = _plain_model(model.get_base_model().config, _merged_weights(model, tensors, dtype), dtype)
        del model
        if backbone == onto:
            _write(plain, tokenizer, out)
            plain = load_plain(str(out), dtype=dtype, device=torch.device("cpu"))
        if samples.held_out:
            plain = _placed(plain, plan, dtype, tokens)
        losses[backbone] = _held_out(plain, samples, compute)
        del plain
    return Losses(losses["adapter"], losses["dequantized"], losses.get("original"))


def _placed(plain: Any, plan: Plan, dtype: torch.dtype, tokens: int) -> Any:
    """A merged model where it can be evaluated."""
    used = _evaluated_in(dtype)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    parts = footprint(
        plan.facts, bits=16, double_quant=False, compute_bytes=used.itemsize, tokens=tokens, scored=tokens
    )
    return move(plain.to(used), choose(parts, device=None, max_memory_bytes=None, in_host=True)).eval()


def _write(plain: Any, tokenizer: Any, out: Path) -> None:
    """The model and its tokenizer, whole or not at all."""
    if tokenizer is not None:
        align_config(plain, tokenizer)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        plain.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        publish_folder(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _evaluated_in(dtype: torch.dtype) -> torch.dtype:
    """16-bit weights are evaluated in float32 on CPUs, most of which emulate 16-bit arithmetic."""
    return dtype if torch.cuda.is_available() else torch.float32


def _held_out(model: Any, samples: Samples, dtype: torch.dtype) -> float:
    if not samples.held_out:
        return float("nan")
    forward = Forward(model, samples, dtype=dtype, fused=False)
    loss, tokens = forward.evaluate(samples.held_out_batches())
    return loss / tokens


def _merged_weights(model: Any, originals: Originals | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of the merged model, on the CPU in `dtype`. originals: None to keep what was trained on."""
    base = model.get_base_model()
    weights: dict[str, torch.Tensor] = {}
    adapted = {name: module for name, module in base.named_modules() if "default" in getattr(module, "lora_B", ())}
    for name, parameter in base.named_parameters():
        owner = next((adapter for adapter in adapted if name.startswith(f"{adapter}.")), None)
        if any(part in name for part in (".lora_", ".trainable_tokens_", ".modules_to_save.")):
            continue
        if name.endswith(PACKING):  # what unpacks a weight, not a weight
            continue
        plain = name
        for wrapper in (".token_adapter", ".base_layer", ".original_module"):
            plain = plain.replace(f"{wrapper}.", ".")
        value = _dequantized(base, name, parameter) if originals is None else originals.read(plain, parameter)
        if owner is not None and name == f"{owner}.base_layer.weight":
            value = value + _delta(adapted[owner]).to(value.device)
        weights[plain] = value.to("cpu", dtype)
    _put_rows(base, weights, dtype)
    return weights


def _dequantized(base: Any, name: str, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter in float32, unpacked where it is packed."""
    path, _, leaf = name.rpartition(".")
    module = base.get_submodule(path)
    if isinstance(module, PackedLinear) and leaf == "weight":
        return module.unpacked(getattr(module, "runs_on", parameter.device))
    return parameter.detach().float()


def _delta(layer: Any) -> torch.Tensor:
    """alpha / r * B A of a LoRA layer in float32, [out, in]."""
    up, down = layer.lora_B["default"].weight.detach().float(), layer.lora_A["default"].weight.detach().float()
    product: torch.Tensor = layer.scaling["default"] * (up @ down)
    return product


def _put_rows(base: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Trained rows of new tokens into their tables."""
    for name, module in base.named_modules():
        if hasattr(module, "trainable_tokens_delta") and "default" in module.trainable_tokens_delta:
            table = weights.get(f"{name.removesuffix('.token_adapter')}.weight")
            if table is None:  # tied: the other name of a table that has its rows already
                continue
            rows = torch.tensor(module.token_indices["default"])
            table[rows] = module.trainable_tokens_delta["default"].detach().to("cpu", dtype)


def _plain_model(config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A model without a trace of quantization or adapter that holds exactly these weights."""
    import copy

    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache, config.dtype = True, dtype
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    absent = sorted(set(missing) - tied)
    if unexpected or absent:
        raise RunError(f"the merged weights do not fit the model: missing {absent[:3]}, unexpected {unexpected[:3]}")
    return model


def main() -> None:
    """`python -m qdist.runtime.merge RUN OUT`, started by the command line."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--onto", default="dequantized")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        losses = merge(RunDir(arguments.run), arguments.out, onto=arguments.onto, dtype=DTYPES[arguments.dtype])
    except QdistError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{arguments.out}: adapter merged onto the {arguments.onto} backbone, {arguments.dtype}")
    print(f"held-out loss  adapter                   {losses.adapter:.4f}")
    print(f"               merged onto dequantized   {losses.dequantized:.4f}")
    if losses.original is not None:
        print(f"               merged onto original      {losses.original:.4f}")


if __name__ == "__main__":
    main()
