"""Which model types of transformers work from plan to merge? Tries each, tiny and random, on one CPU rank.

    python -m bench.models.table [TYPE ...] --results FILE.jsonl [--processes 2] [--write docs/models.md]

Each is planned, packed to NF4, trained for 3 steps and merged to 16 bits; then the merged folder is loaded into plain
transformers and its logits are compared with those of the dequantized weights under the adapter, loaded by plain PEFT.
Types found in FILE are not tried again unless they are named.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

STAGES = ("plan", "train", "merge", "logits")
_LIMIT_S = 240
_TOLERANCE = 2e-3
"""Largest difference of logits over their largest magnitude: both sides hold the same bfloat16 weights."""


def attempt(model_type: str) -> dict[str, Any]:
    """What became of one model type: the stage that it failed at, or none, and figures."""
    result: dict[str, Any] = {"type": model_type, "failed": "config"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _through(model_type, Path(folder), result)
        except Exception as error:  # noqa: BLE001  (whatever a class or we raise is the result)
            ways = f" [{error.try_}]" if getattr(error, "try_", "") else ""
            result["reason"] = f"{type(error).__name__}: {error}{ways}".replace("\n", " ")[:400]
            result["trace"] = traceback.format_exc()[-1500:]
    return result


def _through(model_type: str, folder: Path, result: dict[str, Any]) -> None:
    import torch

    from qdist.host.sources import facts as facts_of_hub
    from qdist.runtime.model.describe import describe, why_not, why_not_by_config
    from tests.runtime.every_model import tiny_config, tiny_model
    from tests.runtime.tiny import real_job, save_data, tiny_tokenizer

    if why := why_not_by_config(tiny_config(model_type)):
        result |= {"apart": True, "reason": why}
        return
    model = tiny_model(model_type)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if why := why_not(model.config, model):
        result |= {"apart": True, "reason": why}
        return
    result["failed"] = "plan"
    base = folder / "base"
    model.save_pretrained(base)
    tiny_tokenizer(bos=False).save_pretrained(base)
    experts = any(shape.experts for shape in describe(deepcopy(model.config), name=model_type).shapes)
    targets = ("all-linear", "experts") if experts else ("all-linear",)
    settings = {"lora__targets": targets, "steps": 3, "seq_len": 32, "train__answers": 0}
    with mock.patch.object(facts_of_hub, "ask", _described_here):
        job = real_job(base, save_data(folder / "data.jsonl", 16), folder / "run", **settings)
    facts = job.plan.facts
    result |= {"layers": facts.layer_count, "experts": experts}
    result["failed"] = "train"
    losses = _train(job)
    result["losses"] = losses
    if not all(loss == loss and abs(loss) < 1e4 for loss in losses) or len(losses) < 3:
        raise ValueError(f"losses are {losses}")
    result["failed"] = "merge"
    out = folder / "merged"
    _export(job.run.path, out)
    result["failed"] = "logits"
    with torch.no_grad():
        result |= _compare(base, out, job.run)
    if result["difference"] > _TOLERANCE:
        raise ValueError(f"logits differ by {result['difference']:.2g} of their size")
    if result["learned"] == 0.0:
        raise ValueError("the adapter changes no logit")
    result["failed"] = ""


def _described_here(request: Any, *, device: str) -> Any:
    """The facts of a class without a process of their own, which would take seconds to import torch."""
    from qdist.core.requests import Answer
    from qdist.runtime.model.describe import run

    return Answer(facts=run(request))


def _train(job: Any) -> list[float]:
    """Train in a rank of its own, forked from this process; the losses of its steps."""
    from qdist.core.planning.plan import digest
    from qdist.core.telemetry.events import decode_lines
    from qdist.host.launch import claim
    from tests.runtime.ranks import _run

    claim.write(job)
    codes = _run({"run": str(job.run.path), "world_size": 1, "digest": digest(job.plan)})
    if any(codes):
        log = job.run.log_file(0).read_text()
        raise RuntimeError(" ".join(log.split()[-70:]) or f"exit code {codes}")
    events = decode_lines(job.run.event_file(0).read_bytes())
    return [event.loss for event in events if event.kind == "step" and event.loss is not None]


def _export(run: Path, out: Path) -> None:
    from qdist.core.requests import Export
    from qdist.runtime.tasks import perform

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        perform(Export(to="16bit", runs=(str(run),), out=str(out)))


def _compare(base: Path, merged: Path, run: Any) -> dict[str, float]:
    """The relative difference of logits between merged folder and adapter, and what the adapter changes."""
    import torch
    from peft import PeftModel

    from bench.models.agree import dequantized
    from qdist.runtime.model.skeleton import load_plain

    cpu = torch.device("cpu")
    plain = dequantized(base, run.plan()).eval()
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    before = _logits(plain, ids)
    adapted = PeftModel.from_pretrained(plain, str(run.adapter)).eval()
    after = _logits(adapted, ids)
    whole = adapted.merge_and_unload()
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    ours = load_plain(str(merged), dtype=torch.bfloat16, device=cpu).float().eval()
    expected, got = _logits(whole, ids), _logits(ours, ids)
    size = float(expected.abs().max())
    return {
        "difference": float((got - expected).abs().max()) / size,
        "rounding": float((after - expected).abs().max()) / size,
        "learned": float((after - before).abs().max()) / size,
    }


def _logits(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, use_cache=False).logits.float()


def _alone(model_type: str) -> dict[str, Any]:
    """`attempt` in a process of its own, which is ended when it takes too long."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        signal.alarm(_LIMIT_S)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        theirs.send(attempt(model_type))
        os._exit(0)
    theirs.close()
    with contextlib.suppress(EOFError):
        return_value: dict[str, Any] = ours.recv()
        os.waitpid(child, 0)
        return return_value
    _, status = os.waitpid(child, 0)
    return {"type": model_type, "failed": "?", "reason": f"ended with status {os.waitstatus_to_exitcode(status)}"}


def _share(types: list[str], path: Path) -> None:
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    for model_type in types:
        result = _alone(model_type)
        with open(path, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{result['type']:28} {'ok' if not result['failed'] else result['failed'] + ': ' + result['reason'][:150]}",
            flush=True,
        )


def all_types() -> list[str]:
    """The model types of transformers' mapping of causal language models, and the wrappers in no such mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mistral3", "qwen3_vl"]


def known_results(path: Path) -> dict[str, Mapping[str, Any]]:
    """The newest result of each type in a file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {result["type"]: result for result in map(json.loads, lines)}


def main() -> None:
    """Try the types, then write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("QDIST_CACHE", tempfile.mkdtemp())
    known = known_results(given.results)
    types = given.types or [each for each in all_types() if each not in known]
    context = multiprocessing.get_context("spawn")
    shares = [
        context.Process(target=_share, args=(types[n :: given.processes], given.results))
        for n in range(given.processes)
    ]
    for share in shares:
        share.start()
    for share in shares:
        share.join()
    if given.write:
        from bench.models.page import page

        given.write.write_text(page(known_results(given.results), version=metadata.version("transformers")))


if __name__ == "__main__":
    sys.exit(main())
