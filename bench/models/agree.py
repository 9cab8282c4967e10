"""Do today's families learn the same everywhere? Tiny random models on CPU ranks, float32.

    python -m bench.models.agree [TYPE ...] [--only plain,ranks,resume,engines,merged]

plain: 10 steps beside a loop of plain transformers and PEFT over the same dequantized weights, experts adapted too.
ranks: two ranks, replicated, sharded and split, against one process. resume: killed behind a checkpoint and resumed.
engines: ZeRO 1, 2 and 3 on two ranks, and shards on three, against one process. merged: logits of the model merged to
16 bits against the adapter's in plain PEFT. `gpt_oss:mxfp4` is gpt-oss with its experts as the hub has them, and
`TYPE:KEY=VALUE` has another value in its config.json.
The last lines are a table: largest difference of a loss, or why there is none.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

TYPES = (
    "phi3", "smollm3", "olmo2", "olmo3", "granite", "cohere2", "arcee", "gemma2", "gemma3", "gemma3_text", "gemma4",
    "gemma4_text", "mistral3", "ministral3", "qwen3_moe", "mixtral", "qwen3_5", "qwen3_5_moe", "gpt_oss",
    "gpt_oss:mxfp4", "gemma4_text:num_hidden_layers=8:layer_types=null:hidden_size_per_layer_input=0",
    "seed_oss:attention_dropout=0.0:residual_dropout=0.0",  # PEFT, and each stage of a split, draws masks of its own
)  # fmt: skip
SHAPE: dict[str, Any] = {
    "seq_len": 32, "global_batch": 4, "micro_batch": 1, "steps": 10, "lora__r": 4, "optim__lr": 3e-3,
    "lora__dropout": 0.0, "train__held_out": 0.2, "train__save_steps": 5, "train__keep": 9, "dtype": "float32",
    "train__answers": 0,
}  # fmt: skip


class Case:
    """One tiny model in a folder, and runs over it."""

    def __init__(self, model_type: str, folder: Path) -> None:
        from tests.runtime.every_model import tiny_model
        from tests.runtime.moe_models import store_as_mxfp4
        from tests.runtime.tiny import save_data, tiny_tokenizer

        self.folder, self.base = folder, folder / "base"
        model_type, *variants = model_type.split(":")
        changes = [variant.split("=") for variant in variants if "=" in variant]
        model = tiny_model(model_type, **{key: json.loads(value) for key, value in changes})
        model.save_pretrained(self.base)
        if "mxfp4" in variants:
            store_as_mxfp4(self.base)
        tiny_tokenizer(bos=False).save_pretrained(self.base)
        self.data = save_data(folder / "data.jsonl", 24)
        experts = any(parameter.dim() == 3 and "expert" in name for name, parameter in model.named_parameters())
        self.targets = ("all-linear", "experts") if experts else ("all-linear",)

    def job(self, name: str, **settings: Any) -> Any:
        from tests.runtime.tiny import real_job

        given = {**SHAPE, "lora__targets": self.targets, **settings}
        return real_job(self.base, self.data, self.folder / name, **given)

    def alone(self) -> Any:
        """The run of one process, trained once."""
        from qdist.host.run.rundir import RunDir

        path = self.folder / "alone"
        return RunDir(path) if path.exists() else trained(self.job("alone", gpus=1))


def trained(job: Any) -> Any:
    """The run directory of a job that forked ranks have trained. Raises RuntimeError with the log's last line."""
    from qdist.core.planning.plan import digest
    from qdist.host.launch import claim
    from tests.runtime.ranks import _run

    claim.write(job)
    codes = _run({"run": str(job.run.path), "world_size": job.plan.world_size, "digest": digest(job.plan)})
    for rank, code in enumerate(codes):
        if code:
            lines = job.run.log_file(rank).read_text().strip().splitlines() or ["no log"]
            raise RuntimeError(f"rank {rank} ended with {code}: {lines[-1][:300]}")
    return job.run


def losses_of(run: Any) -> list[float]:
    """The loss of each step."""
    from qdist.core.telemetry.events import losses
    from qdist.host.run.observer import Follower

    return list(losses([event for event in Follower(run.path).new_events() if event.rank == 0]).values())


def furthest(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two series of the same length."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} losses beside {len(theirs)}")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def plain(case: Case) -> float:
    """Losses beside those of plain transformers and PEFT."""
    return furthest(losses_of(case.alone()), plain_losses(case.base, case.alone().plan()))


def plain_losses(base: Path, plan: Any) -> list[float]:
    """Everybody's loop over a run's micro-batches: logits of the class, torch's AdamW, one process. base: the model."""
    import torch
    from peft import get_peft_model, set_peft_model_state_dict

    from qdist.runtime.adapters.attach import add_adapter
    from qdist.runtime.data.batches import read_samples
    from qdist.runtime.train.result import _adapter_config
    from tests.runtime.tiny import backbone_of

    start = add_adapter(backbone_of(plan), plan)
    initial = adapter_tensors(start, plan)
    model = dequantized(base, plan)
    config = _config(_adapter_config(plan))
    model = get_peft_model(model, config).train()
    loaded = set_peft_model_state_dict(model, initial)
    if loaded.unexpected_keys:
        raise ValueError(f"PEFT does not know {loaded.unexpected_keys[:3]}")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = plan.spec.optim
    optimizer = torch.optim.AdamW(trainable, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay)
    samples, found = read_samples(plan, pad_id=plan_pad(plan)), []
    for step in range(plan.steps):
        batches = [samples.batch(indices) for indices in samples.step(step)]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
            wanted = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def plan_pad(plan: Any) -> int:
    """The id that pads a run's samples."""
    from qdist.runtime.infer.load import load_tokenizer

    return load_tokenizer(plan.source).pad_token_id


def _config(text: str) -> Any:
    from peft import LoraConfig

    return LoraConfig.from_peft_type(**json.loads(text) | {"inference_mode": False})


def adapter_tensors(model: Any, plan: Any) -> dict[str, Any]:
    """The trained tensors of a model of ours under PEFT's names."""
    from qdist.runtime.train.result import peft_name

    return {peft_name(name): value.detach() for name, value in model.named_parameters() if value.requires_grad}


def dequantized(base: Path, plan: Any) -> Any:
    """The plain model with the weights that the run trains on."""
    import torch

    from qdist.runtime.exports.backbone import Backbone
    from qdist.runtime.model.skeleton import load_plain

    model = load_plain(str(base), dtype=torch.float32, device=torch.device("cpu")).float()  # MXFP4 comes as bfloat16
    held, backbone = dict(model.named_parameters()) | dict(model.named_buffers()), Backbone(plan)
    experts = {f"{path}.{each.name}" for path, own in plan.facts.experts.items() for each in own.matrices}
    for weight in backbone.weights():
        name, place = weight.name, held[weight.name].data
        if name in experts:
            value = torch.stack([*map(backbone.matrix_of(name), range(len(place)))])
        else:
            value = backbone.read(name)
        transposed = any(linear.transposed for linear in plan.facts.linears) and plan.facts.packs(
            name.rpartition(".")[0]
        )
        place.copy_(value.t() if transposed and name.endswith(".weight") else value)
    return model


def ranks(case: Case) -> str:
    """Losses of two ranks in each placement beside those of one process."""
    laid = {name: {"gpus": 2, "placement": name} for name in ("replicate", "shard", "split")}
    return " / ".join(beside(case, name, settings) for name, settings in laid.items())


def engines(case: Case) -> str:
    """Losses of ZeRO's stages, and of shards that do not come out even, beside those of one process."""
    laid: dict[str, dict[str, Any]] = {
        f"zero{stage}": {"gpus": 2, "placement": "replicate", "zero__stage": stage} for stage in (1, 2, 3)
    }
    laid["three"] = {"gpus": 3, "placement": "shard", "global_batch": 3}
    return " / ".join(beside(case, name, settings) for name, settings in laid.items())


def beside(case: Case, name: str, settings: dict[str, Any]) -> str:
    """Largest difference between the losses of a run and those of one process over the same batches, or the error."""
    try:
        one = case.alone()
        if batch := settings.get("global_batch"):
            one = trained(case.job(f"alone-{batch}", gpus=1, global_batch=batch))
        return f"{furthest(losses_of(trained(case.job(name, **settings))), losses_of(one)):.1e}"
    except Exception as error:  # noqa: BLE001  (what is raised is the result)
        return f"{type(error).__name__}: {str(error)[:160]}"


def merged(case: Case) -> float:
    """Logits of the merged model beside those of plain PEFT, both rounded to bfloat16."""
    import torch

    from bench.models.table import _compare, _export

    _export(case.alone().path, case.folder / "merged")
    with torch.no_grad():
        return _compare(case.base, case.folder / "merged", case.alone())["difference"]


def resume(case: Case) -> float:
    """The losses of a run killed behind a checkpoint and resumed, beside those of the whole one."""
    from qdist.host.launch import prepare
    from qdist.host.run.rundir import RunDir
    from qdist.runtime.train.checkpoint import load_tensors

    alone, resumed = case.alone(), RunDir(case.folder / "resumed")
    shutil.copytree(alone.path, resumed.path)
    (resumed.path / "result.json").unlink()
    shutil.rmtree(resumed.adapter)
    shutil.rmtree(resumed.checkpoint(10))
    trained(prepare.prepare_resume(resumed, {}))
    one, other = (load_tensors(run.adapter / "adapter_model.safetensors") for run in (alone, resumed))
    if one.keys() != other.keys():
        raise ValueError("the adapters have other tensors")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


CHECKS = {"plain": plain, "ranks": ranks, "resume": resume, "engines": engines, "merged": merged}


def main() -> None:
    """Try every type and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--only", default="plain,ranks,resume")
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("QDIST_CACHE", tempfile.mkdtemp())
    import bitsandbytes  # noqa: F401  (once, not in every rank that is forked)
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    for model_type in given.types:
        row = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                case = Case(model_type, Path(folder))
            except Exception as error:  # noqa: BLE001  (what is raised is the result)
                print(f"| {model_type} | {type(error).__name__}: {error}", flush=True)
                continue
            for name, check in CHECKS.items():
                if name not in given.only.split(","):
                    continue
                try:
                    value = check(case)
                    row.append(f"{value:.1e}" if isinstance(value, float) else value)
                except Exception as error:  # noqa: BLE001  (what is raised is the result)
                    row.append(f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " "))
        print(f"| {model_type} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
