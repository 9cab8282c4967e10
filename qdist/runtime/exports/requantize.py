"""Merges a run into 16 bits and quantizes that by GPTQ anew: 4 bits for any reader, at a loss, which is measured."""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.model.gptq import Gptq, Shape, usual_format
from qdist.core.planning.plan import Plan
from qdist.core.text import format_bytes
from qdist.host.terminal import say
from qdist.runtime.exports import merged_16bit
from qdist.runtime.exports.backbone import Backbone
from qdist.runtime.exports.evaluation import Evaluation, Loss, losses_of
from qdist.runtime.exports.job import Export
from qdist.runtime.formats.work_folder import reserved
from qdist.runtime.infer.load import load_tokenizer
from qdist.runtime.quantize.gptq.calibrate import pieces
from qdist.runtime.quantize.gptq.job import Wanted
from qdist.runtime.quantize.gptq.make import make


def run(job: Export) -> None:
    """Write a GPTQ checkpoint with the groups and the order of the run's own, or of 128; say what each step loses.

    The 16-bit model lies beside until the checkpoint is there; killed, the same command goes on where it was.
    Raises RunError for random weights, which have no tokenizer to read calibration data with; DataError, before
    anything is written, for too little data.
    """
    plan, asked = job.adapters.plan, wanted(job, job.adapters.plan)
    if plan.source.kind == "dummy":
        raise RunError("random weights have no data to calibrate on", try_="--to 16bit")
    tokenizer = load_tokenizer(plan.source)
    pieces(asked.data, tokenizer, samples=asked.samples, seq_len=asked.seq_len, seed=asked.seed)
    prefix = f"{job.out.name}.16bit-"
    with reserved(job.out.with_name(f".{prefix}lock")):
        between = job.out.with_name(f".{prefix}{_stamp(job, plan)}")
        _remove_others(between, prefix)
        if not between.is_dir():
            merged_16bit.write(job.adapters, between, onto=job.onto, dtype=job.torch_dtype)
        losses = _losses(job, between)
        gptq = make(str(between), job.out, asked, when_written=partial(_remove, between, prefix))
    losses["merged and quantized"] = Evaluation(job.adapters.runs[0]).quantized(job.out)
    size = sum(file.stat().st_size for file in Path(job.out).glob("*.safetensors"))
    say(f"{job.out}: {gptq}, {format_bytes(size)}")
    say(losses_of(losses))


def _losses(job: Export, between: Path) -> dict[str, Loss]:
    """Before quantizing. The adapter's own loss is of one run, as it is."""
    evaluation = Evaluation(job.adapters.runs[0])
    own = {"adapter": evaluation.adapter()} if job.adapters.alone else {}
    return {**own, "merged, 16 bits": evaluation.written(between, job.torch_dtype)}


def _remove_others(between: Path, prefix: str) -> None:
    """What killed exports of other runs, or onto another backbone, left of the same name."""
    for path in between.parent.iterdir():
        if path.name.lstrip(".").startswith(prefix) and between.name not in path.name and path.is_dir():
            shutil.rmtree(path)


def _remove(between: Path, prefix: str) -> None:
    """Under another name first: half of it must not be taken for a model by the next command."""
    os.rename(between, between.with_name(f".{prefix}spent"))
    shutil.rmtree(between.with_name(f".{prefix}spent"))


def _stamp(job: Export, plan: Plan) -> str:
    """Says what the 16-bit model was made of."""
    contents = f"{job.adapters.stamp} {job.onto} {job.dtype} {Backbone(plan, onto=job.onto).identity()}"
    return hashlib.sha256(contents.encode()).hexdigest()[:12]


def wanted(job: Export, plan: Plan) -> Wanted:
    """As the run's checkpoint was quantized; what it was trained on is what it is calibrated on, unless told."""
    own = plan.source.gptq or Gptq(shape=Shape(4, 128))
    bits = job.bits or own.shape.bits
    return Wanted(
        data=job.data or plan.spec.data,
        bits=(bits,),
        group_size=job.group_size or own.shape.group_size,
        sym=own.sym,
        desc_act=own.desc_act,
        format=usual_format(sym=own.sym, widths=(bits,)),
        samples=job.samples,
        seq_len=min(plan.seq_len, plan.facts.max_positions),
    )
