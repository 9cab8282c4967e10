"""Models of two narrow layers, made in a moment, and runs over them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch

from qdist.core.machine.cluster import Cluster, joined
from qdist.core.planning.plan import Plan, Prepared
from qdist.core.spec.run_spec import RunSpec, nest, resolve
from qdist.host import tasks
from qdist.host.launch import claim
from qdist.host.launch import prepare as launcher
from qdist.host.machine import probe
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.attach import add_adapter
from qdist.runtime.data.batches import Samples, collate, read_samples
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet
from qdist.runtime.engine.objective import Forward
from qdist.runtime.engine.torch import Adapter, State, to_cpu
from qdist.runtime.model.skeleton import DTYPES, load_backbone
from qdist.runtime.train import checkpoint
from qdist.runtime.train.prepare import prepare
from qdist.runtime.train.result import gather
from qdist.runtime.train.setup import prepare_for_training
from tests.runtime.data.test_tokenized import tiny_tokenizer

VOCAB = 320
_GROUPED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "olmo2": _GROUPED,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "pad_token_id": 2,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
FAMILIES = tuple(_FAMILIES)
_TIED = ("bloom", "opt")


def tiny_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json. Weights are drawn wide, so that a model prefers some tokens clearly."""
    common = {"model_type": family, "vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    return {**common, "tie_word_embeddings": family in _TIED, **_FAMILIES.get(family, {}), **changes}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A float32 model with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = tiny_config(family, **changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()


def save_config(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A folder with nothing but a config.json: enough for random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(family, **changes)))
    return folder


def save_model(folder: Path, family: str = "llama", *, tokenizer: Any = None, **changes: Any) -> Path:
    """A folder as `save_pretrained` leaves it, with a tokenizer that lacks a pad."""
    tiny_model(family, **changes).save_pretrained(folder)
    (tokenizer or tiny_tokenizer(bos=False)).save_pretrained(folder)
    return folder


def save_data(path: Path, count: int = 40) -> Path:
    """Questions of different lengths and short answers."""
    records = [
        {"prompt": f"hello {'there ' * (n % 4)}{n}", "completion": f"system {n % 3} {'a' * (n % 5)}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def dummy_job(model: Path, run: Path, *, nodes: Sequence[int] = (), **settings: Any) -> launcher.Launch:
    """A run over random weights and tokens, planned and not yet written. Settings are dotted, with `__` for the dot.

    nodes: CPU ranks of each node; empty for this machine alone.
    """
    return _job(_spec(settings, model=str(model), run=str(run), load_format="dummy"), nodes)


def real_job(model: Path, data: Path, run: Path, *, nodes: Sequence[int] = (), **settings: Any) -> launcher.Launch:
    """A run over a saved model and data, prepared in this process. nodes: as for `dummy_job`."""
    spec = _spec(settings, model=str(model), run=str(run), **{"data.path": str(data)})
    with mock.patch.object(tasks, "prepare", _prepared):
        return _job(spec, nodes)


def _job(spec: RunSpec, nodes: Sequence[int]) -> launcher.Launch:
    asked = launcher.new_run(spec, here=machines(nodes) if nodes else None)
    return launcher.job_of(asked, launcher.prepared_for(asked))


def machines(nodes: Sequence[int]) -> Cluster:
    """Nodes like this machine, with a number of CPU ranks each."""
    names = [f"node{number}" for number in range(len(nodes))]
    return joined([probe.cluster()] * len(nodes), names, nodes, None)


def _prepared(spec: RunSpec, *, device: str) -> Prepared:
    return msgspec.json.decode(msgspec.json.encode(prepare(spec)), type=Prepared)


def _spec(settings: Mapping[str, Any], **more: Any) -> RunSpec:
    defaults = {"seq_len": 16, "global_batch": 4, "lora.r": 4, "optim.lr": 1e-2, "steps": 4}
    return resolve(nest({**defaults, **more, **{key.replace("__", "."): value for key, value in settings.items()}}))


def plan_of(model: Path, run: Path, **settings: Any) -> Plan:
    return dummy_job(model, run, **settings).plan


def backbone_of(plan: Plan, **more: Any) -> Any:
    return load_backbone(
        plan.source,
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=DTYPES[plan.compute_dtype],
        device=torch.device("cpu"),
        facts=plan.facts,
        **more,
    )


def trainable(plan: Plan) -> tuple[Any, Adapter, Samples]:
    """The model with its adapter, the adapter as engines see it, the samples: what a rank builds."""
    model = add_adapter(backbone_of(plan), plan)
    prepare_for_training(model, plan)
    samples = read_samples(plan, pad_id=0)
    forward = Forward(model, samples, dtype=DTYPES[plan.compute_dtype], fused=False)
    return model, Adapter(model, forward.loss), samples


def written(job: launcher.Launch) -> RunDir:
    claim.write(job)
    return job.run


def samples_of(lengths: list[int], *, prompt: int = 2, seed: int = 0, low: int = 5) -> TokenizedSet:
    """Random samples whose first `prompt` tokens have no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, VOCAB, (sum(lengths),), dtype=torch.int32, generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    labels = tokens.clone()
    for start in offsets[:-1].tolist():
        labels[start : start + prompt] = IGNORED
    learned = sum(length - prompt for length in lengths)
    summary = Summary(records=len(lengths), dropped=0, truncated=0, tokens=len(tokens), learned_tokens=learned)
    return TokenizedSet(tokens, labels, offsets, summary)


def padded(lengths: list[int], *, pad_id: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A right-padded micro-batch of random samples with masked prompts."""
    return collate(range(len(lengths)), samples_of(lengths, seed=seed), pad_id=pad_id)


def adapted_run(job: launcher.Launch, *, scale: float = 0.05) -> tuple[RunDir, Any]:
    """A run as it is after its last step, with random numbers in place of training; and the model that 'trained'."""
    run = written(job)
    model, adapter, _ = trainable(job.plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    state = State({name: to_cpu(value) for name, value in adapter.named().items()}, {}, job.plan.steps)
    progress = checkpoint.Progress(step=job.plan.steps, samples=0)
    checkpoint.save(run, progress, state, keep=1)
    gather(run, step=job.plan.steps)
    return run, model.eval()


def logits_of(model: Any, *, high: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Float32 logits over random tokens below `high`, the last tokens of the vocabulary always among them."""
    ids = torch.randint(0, high, (2, 16), generator=torch.Generator().manual_seed(seed))
    ids[0, 1:5] = torch.arange(high - 4, high)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits.float()
    return logits
