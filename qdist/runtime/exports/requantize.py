"""Merges a run into 16 bits and requantizes that by GPTQ: 4 bits for any reader, at a loss that is measured."""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from qdist.core.data.reading import Reading, reading_of
from qdist.core.errors import RunError
from qdist.core.model.gptq import Gptq, Shape, usual_format
from qdist.core.planning.plan import Plan
from qdist.core.requests import Export, GptqSettings
from qdist.core.text import format_bytes
from qdist.host.data.sources import unweighted
from qdist.host.terminal import say
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.merge import Evaluation, Loss, losses_of
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.work_folder import reserved
from qdist.runtime.infer.load import load_tokenizer
from qdist.runtime.model.skeleton import DTYPES
from qdist.runtime.quantize.gptq.calibrate import pieces
from qdist.runtime.quantize.gptq.make import make


def run(request: Export) -> None:
    """Write a GPTQ checkpoint with the run's groups and order, or groups of 128; report what each step loses.

    The 16-bit model lies beside until the checkpoint is there; killed, the same command goes on where it was.
    Raises RunError for random weights, which have no tokenizer to read calibration data with; DataError, before
    anything is written, for too little data.
    """
    adapters, out = Adapters.named_in(request), Path(request.out)
    plan = adapters.plan
    if plan.source.kind == "dummy":
        raise RunError("random weights have no data to calibrate on", try_="--to 16bit")
    asked = wanted(request, plan)
    tokenizer = load_tokenizer(plan.source)
    pieces(asked, tokenizer, seq_len=asked.seq_len)
    prefix = f"{out.name}.16bit-"
    with reserved(out.with_name(f".{prefix}lock")):
        between = out.with_name(f".{prefix}{_stamp(request, adapters)}")
        _remove_others(between, prefix)
        if not between.is_dir():
            merged_16bit.write(adapters, between, onto=request.backbone, dtype=DTYPES[request.stored])
        losses = _losses(adapters, between, DTYPES[request.stored])
        gptq = make(str(between), out, asked, when_written=partial(_remove, between, prefix))
    losses["merged and quantized"] = Evaluation(adapters.runs[0]).quantized(out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    say(f"{out}: {gptq}, {format_bytes(size)}")
    say(losses_of(losses))


def _losses(adapters: Adapters, between: Path, dtype: torch.dtype) -> dict[str, Loss]:
    """Losses before quantizing. The adapter's own is known only for one unscaled run."""
    evaluation = Evaluation(adapters.runs[0])
    own = {"adapter": evaluation.adapter()} if adapters.alone else {}
    return {**own, "merged, 16 bits": evaluation.written(between, dtype)}


def _remove_others(between: Path, prefix: str) -> None:
    """Delete what killed exports of other runs, or onto another backbone, left under the same name."""
    for path in between.parent.iterdir():
        if path.name.lstrip(".").startswith(prefix) and between.name not in path.name and path.is_dir():
            shutil.rmtree(path)


def _remove(between: Path, prefix: str) -> None:
    """Delete a folder, renaming it first: the next command must not mistake half of it for a model."""
    os.rename(between, between.with_name(f".{prefix}spent"))
    shutil.rmtree(between.with_name(f".{prefix}spent"))


def _stamp(request: Export, adapters: Adapters) -> str:
    """Identifies what the 16-bit model was made from."""
    backbone = Backbone(adapters.plan, onto=request.backbone)
    contents = f"{adapters.stamp} {request.backbone} {request.stored} {backbone.identity()}"
    return hashlib.sha256(contents.encode()).hexdigest()[:12]


def wanted(request: Export, plan: Plan) -> GptqSettings:
    """The quantization settings of the run's checkpoint; calibrated on the training data unless told otherwise."""
    own = plan.source.gptq or Gptq(shape=Shape(4, 128))
    bits, own_data = request.bits or own.shape.bits, plan.spec.data
    return GptqSettings(
        data=request.data or unweighted(own_data.path),
        reading=Reading() if request.data else reading_of(own_data, plan.spec.format),
        skip_bad=0 if request.data else own_data.skip_bad,
        bits=(bits,),
        group_size=request.group_size or own.shape.group_size,
        sym=own.sym,
        desc_act=own.desc_act,
        format=usual_format(sym=own.sym, widths=(bits,)),
        samples=request.samples or 128,
        seq_len=min(plan.seq_len, plan.facts.max_positions),
    )
