"""Keys of transformers' TrainingArguments, bitsandbytes and PEFT, which the other programs take over."""

import re
from typing import Any

from qdist.core.spec.recipes.rules import (
    ACCUMULATION,
    MICRO,
    OFF,
    STAGE,
    WARMUP_SHARE,
    Outcome,
    Remark,
    Rule,
    Values,
    anyhow,
    listed,
    lost,
    number,
    off,
    only,
    related,
    same,
    switched,
    unless_off,
    whole,
)
from qdist.core.spec.sections import OPTIMIZERS_ELSEWHERE

SAVED = "qdist writes checkpoints that resume on any number of ranks"
PLANNED = "the planner decides"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _schedule(value: Any, recipe: Values) -> Outcome:
    word = str(value)
    if word not in ("constant", "linear", "cosine"):
        return lost(f"optim.schedule has constant, linear and cosine, not {word}")
    warmed = [key for key in ("warmup_steps", "warmup_ratio") if recipe.get(key)]
    if word == "constant" and warmed:
        return Outcome({"optim.schedule": word}, (Remark("anyhow", f"a constant schedule leaves {warmed[0]} unused"),))
    return Outcome({"optim.schedule": word})


def _warmup_steps(value: Any, recipe: Values) -> Outcome:
    if value in OFF or _schedule_of(recipe) == "constant":
        return Outcome()
    count = number(value)
    return Outcome({WARMUP_SHARE: count} if count < 1 else {"optim.warmup_steps": whole(value)})


def _warmup_ratio(value: Any, recipe: Values) -> Outcome:
    unused = value in OFF or recipe.get("warmup_steps") not in OFF or _schedule_of(recipe) == "constant"
    return Outcome() if unused else Outcome({WARMUP_SHARE: number(value)})


def _schedule_of(recipe: Values) -> str:
    return str(recipe.get("lr_scheduler_type", recipe.get("lr_scheduler")))


def _optimizer(value: Any, _: Values) -> Outcome:
    word = str(value).lower()
    named = OPTIMIZERS_ELSEWHERE.get(word) or ({"optim.name": word} if word in ("adamw", "paged-adamw") else None)
    return Outcome(named) if named else lost(f"optim.name has forms of AdamW, not {value}")


def _trackers(value: Any, _: Values) -> Outcome:
    words = [str(word) for word in listed(value) if word not in (*OFF, "all")]
    known = [word for word in words if word in TRACKERS]
    left = ", ".join(word for word in words if word not in known)
    remarks = (Remark("anyhow", f"qdist has {', '.join(TRACKERS)}, not {left}"),) if left else ()
    return Outcome({"trackers": known} if known else {}, remarks)


def _deepspeed(value: Any, _: Values) -> Outcome:
    if value in OFF:
        return Outcome()
    if isinstance(value, dict):
        own = value.get("zero_optimization")
        stage = own.get("stage") if isinstance(own, dict) else None
    else:
        found = re.search(r"(?:zero|z|ds)_?-?([0-3])", str(value), re.IGNORECASE)
        stage = found and found[1]
    if stage is None:
        return Outcome(remarks=(Remark("anyhow", f"{PLANNED} on placement and ZeRO; no stage is named here"),))
    return Outcome({STAGE: whole(stage)})


def _fsdp(value: Any, _: Values) -> Outcome:
    return Outcome() if value in OFF else Outcome({STAGE: 3})


def _evaluated(value: Any, recipe: Values) -> Outcome:
    return Outcome() if value in OFF or number(value) < 1 else Outcome({"train.eval_steps": whole(value)})


def _saved(value: Any, recipe: Values) -> Outcome:
    if value in OFF or str(recipe.get("save_strategy", "steps")) in ("no", "epoch"):
        return Outcome()
    if number(value) < 1:
        return Outcome(remarks=(Remark("anyhow", "a share of the steps; train.save_steps counts steps"),))
    return Outcome({"train.save_steps": whole(value)})


def _dtype(value: Any, _: Values) -> Outcome:
    word = str(value).removeprefix("torch.").lower()
    return Outcome({"dtype": word} if word in ("bfloat16", "float16", "float32") else {})


def width(bits: int) -> Rule:
    """A switch for a backbone of so many bits."""
    return related("bits", lambda value, _: Outcome() if value in OFF else Outcome({"bits": bits}))


def targets(value: Any, _: Values) -> Outcome:
    """Modules that get an adapter."""
    if isinstance(value, str) and re.search(r"[*+?()|^$\\\[\]]", value):
        return lost("lora.targets names modules by their last name, not by a regular expression")
    names = [str(name) for name in listed(value)]
    if set(names) & {"all", "all-linear"}:
        return Outcome({"lora.targets": ["all-linear"]})
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    apart = Remark("altered", "lora.targets goes by last names: modules of that name in every layer get an adapter")
    return Outcome({"lora.targets": short}, (apart,) if short != names else ())


PRECISION = "qdist takes bfloat16 where the GPU has it, else float16; the adapter is float32"
_KERNELS = f"{PLANNED} on attention and kernels"
_NO_CHANGE = {
    "bf16": PRECISION, "fp16": PRECISION, "tf32": "matrix products of the adapter stay in float32",
    "logging_steps": "every step is logged", "logging_dir": "the run's own folder holds the logs",
    "logging_first_step": "every step is logged", "logging_strategy": "every step is logged",
    "log_level": "nothing to set", "disable_tqdm": "nothing to set", "run_name": "a run is named by its folder",
    "save_safetensors": "adapters are always safetensors", "save_only_model": SAVED, "save_strategy": SAVED,
    "resume_from_checkpoint": "qdist launch --resume --run RUN", "overwrite_output_dir": "a run is never overwritten",
    "dataloader_num_workers": "tokens are read from a mapped file", "dataloader_pin_memory": "nothing to set",
    "dataloader_prefetch_factor": "nothing to set", "dataloader_persistent_workers": "nothing to set",
    "dataset_num_proc": "nothing to set", "remove_unused_columns": "unused columns are named once",
    "ddp_timeout": "train.stuck_seconds ends a run that hangs", "ddp_find_unused_parameters": "nothing to set",
    "ddp_bucket_cap_mb": "nothing to set", "per_device_eval_batch_size": f"{PLANNED}",
    "eval_batch_size": f"{PLANNED}", "eval_accumulation_steps": "nothing to set",
    "gradient_checkpointing": f"{PLANNED}, layer by layer; the results are equal",
    "gradient_checkpointing_kwargs": f"{PLANNED}, layer by layer; the results are equal",
    "use_reentrant_gc": f"{PLANNED}, layer by layer; the results are equal",
    "torch_compile": _KERNELS, "torch_compile_backend": _KERNELS, "torch_compile_mode": _KERNELS,
    "attn_implementation": _KERNELS, "use_cache": "generation always uses a cache",
    "group_by_length": "packed rows take its place; the order of samples is drawn by the seed",
    "low_cpu_mem_usage": "weights are always read slice by slice", "device_map": f"{PLANNED} on the placement",
    "push_to_hub": "qdist push RUN OWNER/NAME, once the run is done", "hub_model_id": "qdist push RUN OWNER/NAME",
    "hub_strategy": "qdist push RUN OWNER/NAME", "hub_private_repo": "qdist push --private",
    "hub_token": "HF_TOKEN, in the environment", "hub_always_push": "qdist push RUN OWNER/NAME",
    "load_best_model_at_end": "the best checkpoint is kept: qdist gather RUN --checkpoint best",
    "greater_is_better": "known of every figure", "eval_on_start": "every run is evaluated before step 1",
    "include_tokens_per_second": "always measured", "include_num_input_tokens_seen": "always measured",
    "do_train": "training is what a recipe is for", "fsdp_config": f"{PLANNED} on the placement",
    "bnb_4bit_quant_storage": "packed bytes are stored as bytes, and never altered",
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all ranks",
    "torch_empty_cache_steps": "nothing to set", "neftune_noise_embeddings": "nothing to set",
}  # fmt: skip

TRAINER: dict[str, Rule] = {
    **{key: anyhow(why) for key, why in _NO_CHANGE.items()},
    "bf16": anyhow(PRECISION, "dtype"),
    "fp16": anyhow(PRECISION, "dtype"),
    "gradient_checkpointing": anyhow(_NO_CHANGE["gradient_checkpointing"], "train.checkpointing")._replace(
        is_same=True
    ),
    "group_by_length": anyhow(_NO_CHANGE["group_by_length"], "pack"),
    "device_map": anyhow(_NO_CHANGE["device_map"], "placement"),
    "learning_rate": same("optim.lr"),
    "per_device_train_batch_size": Rule(lambda value, _: Outcome({MICRO: whole(value)}), "micro_batch", is_same=True),
    "gradient_accumulation_steps": related("global_batch", lambda value, _: Outcome({ACCUMULATION: whole(value)})),
    "num_train_epochs": unless_off("epochs"),
    "max_steps": unless_off("steps"),
    "max_grad_norm": same("optim.clip"),
    "weight_decay": same("optim.weight_decay"),
    "adam_beta1": same("optim.beta1"),
    "adam_beta2": same("optim.beta2"),
    "adam_epsilon": same("optim.eps"),
    "lr_scheduler_type": Rule(_schedule, "optim.schedule", is_same=True),
    "lr_scheduler_kwargs": off("schedules have no further settings"),
    "warmup_steps": related("optim.warmup_steps", _warmup_steps),
    "warmup_ratio": related("optim.warmup_steps", _warmup_ratio),
    "optim": related("optim.name", _optimizer),
    "optim_args": off("optimizers have no further settings"),
    "optim_target_modules": off("the adapter alone is trained"),
    "seed": same("seed"),
    "data_seed": anyhow("one seed draws the order of samples and all else"),
    "report_to": Rule(_trackers, "trackers", is_same=True),
    "output_dir": same("run"),
    "save_total_limit": unless_off("train.keep"),
    "save_steps": related("train.save_steps", _saved),
    "eval_steps": related("train.eval_steps", _evaluated),
    "use_liger_kernel": same("liger"),
    "fp8": switched("compute", "fp8"),
    "deepspeed": related("zero.stage", _deepspeed),
    "fsdp": related("placement", _fsdp),
    "trust_remote_code": same("trust_remote_code"),
    "load_in_4bit": width(4),
    "load_in_8bit": width(8),
    "bnb_4bit_quant_type": same("quant.type"),
    "bnb_4bit_use_double_quant": same("quant.double"),
    "bnb_4bit_compute_dtype": Rule(_dtype, "dtype", is_same=True),
    "torch_dtype": Rule(_dtype, "dtype", is_same=True),
    "lora_alpha": same("lora.alpha"),
    "lora_dropout": same("lora.dropout"),
    "target_modules": Rule(targets, "lora.targets", is_same=True),
    "use_rslora": switched("lora.variant", "rslora"),
    "use_dora": off("adapters are LoRA, rsLoRA and QA-LoRA, not DoRA"),
    "init_lora_weights": only((True,), "B starts at zero, and A as PEFT's default has it"),
    "modules_to_save": off("only adapters are trained, and rows of new tokens"),
    "neftune_noise_alpha": off("noise in the embeddings (NEFTune) is not there"),
    "label_smoothing_factor": off("the loss has no label smoothing"),
    "loss_type": only(("nll", "chunked_nll"), "the loss is the negative log-likelihood"),
    "metric_for_best_model": related(
        "train.best",
        lambda value, _: (
            Outcome()
            if str(value).removeprefix("eval_") == "loss"
            else Outcome(remarks=(Remark("anyhow", "the best checkpoint is that of the least held-out loss"),))
        ),
    ),
}
"""Keys that mean the same wherever they are found."""
