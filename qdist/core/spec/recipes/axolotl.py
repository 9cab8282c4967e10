"""What are the keys of an Axolotl recipe, `axolotl train FILE`?"""

from collections.abc import Mapping
from typing import Any

from qdist.core.data.record_turns import SPEAKERS
from qdist.core.spec.recipes.rules import (
    ACCUMULATION,
    EVALS,
    MICRO,
    OFF,
    SAVES,
    Outcome,
    Remark,
    Rule,
    Source,
    Values,
    anyhow,
    entries,
    listed,
    lost,
    mapping,
    number,
    off,
    only,
    pairs,
    related,
    same,
    switched,
    unless_off,
    whole,
)
from qdist.core.spec.recipes.trainer import PLANNED, TRAINER, targets

SIGNS = frozenset((
    "base_model", "adapter", "datasets", "micro_batch_size", "sequence_len", "num_epochs", "val_set_size",
    "sample_packing", "lora_target_linear", "dataset_prepared_path", "lr_scheduler", "optimizer", "train_on_inputs",
    "pad_to_sequence_len", "evals_per_epoch", "saves_per_epoch", "special_tokens", "flash_attention", "strict",
))  # fmt: skip
"""Keys by which its recipes are known."""
DEFAULTS: Values = {
    "gradient_accumulation_steps": 1, "micro_batch_size": 1, "num_epochs": 1, "lr_scheduler": "cosine",
    "max_grad_norm": 1.0, "lora_dropout": 0.0, "sequence_len": 512, "val_set_size": 0.0, "seed": 42,
    "warmup_ratio": 0.03, "bits": 16,
}  # fmt: skip
"""What Axolotl takes for keys that a recipe leaves out, where it is not what qdist takes. bits: of load_in_4bit."""
_FORMATS: Mapping[str, Mapping[str, Any]] = {
    "alpaca": {"format": "alpaca", "data.template": "alpaca"},
    "chat_template": {"format": "messages"}, "sharegpt": {"format": "sharegpt"}, "completion": {"format": "text"},
    "pretrain": {"format": "text"},
}  # fmt: skip
_TEMPLATES = {
    **{name: name for name in ("alpaca", "chatml", "llama3", "gemma", "zephyr")},
    "mistral_v1": "mistral", "mistral_v2v3": "mistral",
}  # fmt: skip
_FILES = ("json", "csv", "parquet", "text", "arrow")
"""Loaders of `datasets` that stand where a hub id may."""
_COLUMNS = {
    "field": "text", "field_instruction": "instruction", "field_input": "input", "field_output": "output",
    "field_system": "system", "field_messages": "messages", "field_tools": "tools",
}  # fmt: skip
"""Its name of a column -> ours."""
_ENTRY = {
    *_COLUMNS, "path", "name", "split", "type", "data_files", "ds_type", "message_property_mappings", "roles",
    "message_field_role", "message_field_content", "chat_template", "trust_remote_code", "shards", "conversation",
    "roles_to_train", "train_on_eos", "preprocess_shards", "revision",
}  # fmt: skip
"""Keys of an entry of `datasets` that are read."""


def refusal(recipe: Values) -> str:
    """Why the recipe is for another kind of training; empty if it is not."""
    adapter = recipe.get("adapter")
    if recipe.get("rl") not in OFF:
        return f"rl: {recipe['rl']} learns from preferences; qdist learns answers"
    if recipe.get("reward_model") or recipe.get("process_reward_model"):
        return "a reward model is to be trained; qdist trains language models"
    if adapter in OFF:
        return "adapter is not set, and so all weights would be trained; qdist trains adapters over a frozen backbone"
    return "" if adapter in ("qlora", "lora") else f"adapter {adapter} is not there; lora and qlora are"


def _entries(value: Any, *, key: str) -> Outcome:
    """A list of data sets, all of one format."""
    sets = entries(value, "datasets")
    read, paths = [_format(each) for each in sets], ",".join(str(_source(each)) for each in sets)
    remarks = [remark for own in read for remark in own.remarks]
    for each, own in zip(sets, read, strict=True):
        if own.settings != read[0].settings:
            remarks.append(
                Remark("lost", f"{each.get('path')} has another format or other columns than {sets[0].get('path')}")
            )
    return Outcome({key: paths, **(read[0].settings if read else {})}, tuple(remarks))


def _tests(value: Any, recipe: Values) -> Outcome:
    """`test_datasets`, which are read as the sets that are trained on."""
    key, trained = "data.eval", entries(recipe.get("datasets") or [], "datasets")
    remarks = _entries([*trained, *entries(value, "test_datasets")], key=key).remarks
    before = len(_entries(trained, key=key).remarks)
    return Outcome({key: _entries(value, key=key).settings[key]}, remarks[before:])


def _source(entry: Mapping[str, Any]) -> Source:
    path, files = str(entry.get("path")), listed(entry.get("data_files") or [])
    if files and path in _FILES:
        return Source(",".join(map(str, files)))
    return Source(path, str(entry.get("name") or ""), str(entry.get("split") or ""))


def _format(entry: Mapping[str, Any]) -> Outcome:
    """How the records of an entry are read."""
    kind = entry.get("type") or "completion"
    fields = {**entry, **kind} if isinstance(kind, Mapping) else entry
    remarks = [Remark("lost", f"{key} of an entry is not there") for key in entry if key not in _ENTRY]
    settings: dict[str, Any] = {}
    if isinstance(kind, Mapping):
        settings["format"] = "alpaca"
        if any(kind.get(key) for key in ("format", "no_input_format", "system_prompt", "system_format")):
            remarks.append(Remark("lost", "wordings of one's own go into a Jinja file: data.template=FILE"))
    elif (word := str(kind).partition(".")[0]) in _FORMATS:
        settings |= _FORMATS[word]
    else:
        remarks.append(Remark("lost", f"there is no format for type {kind}; the records' own keys are detected"))
    if columns := pairs({own: fields.get(theirs) for theirs, own in _COLUMNS.items()}):
        settings["data.columns"] = columns
    remarks += _turns(entry, settings)
    return Outcome(settings, tuple(remarks))


def _turns(entry: Mapping[str, Any], settings: dict[str, Any]) -> list[Remark]:
    """Who speaks, and what of a conversation is learned; adds to the settings."""
    remarks: list[Remark] = []
    known = {"role": ("role", "from"), "content": ("content", "value", "text")}
    mapped = {**mapping(entry.get("message_property_mappings"), "message_property_mappings")}
    mapped |= {own: entry[f"message_field_{own}"] for own in known if entry.get(f"message_field_{own}")}
    if columns := pairs(
        {f"messages.{own}": theirs for own, theirs in mapped.items() if theirs not in known.get(own, (own,))}
    ):
        settings["data.columns"] = [*settings.get("data.columns", ()), *columns]
    roles = {own: _unknown(own, names) for own, names in mapping(entry.get("roles"), "roles").items()}
    if own_roles := pairs({own: names[0] for own, names in roles.items() if names}):
        settings["data.roles"] = own_roles
    for own, names in roles.items():
        if names[1:]:
            remarks.append(Remark("lost", f"{own} has the names {', '.join(names)}, and data.roles takes one"))
    if entry.get("chat_template"):
        said = _template(entry["chat_template"], {})
        settings |= said.settings
        remarks += said.remarks
    if entry.get("roles_to_train") not in (None, ["assistant"], ["gpt"], ["assistant", "gpt"]):
        remarks.append(Remark("lost", "answers are learned, or all with train.train_on_source=true"))
    if entry.get("train_on_eos") not in (None, "turn", "all"):
        remarks.append(Remark("lost", "the end of every learned answer is learned"))
    if entry.get("shards"):
        remarks.append(Remark("lost", "a part of a set is a count: PATH#2000"))
    return remarks


def _unknown(role: str, names: Any) -> list[str]:
    """Names of a role that are not detected."""
    return [name for name in map(str, listed(names)) if SPEAKERS.get(name.strip().lower()) != SPEAKERS.get(role, role)]


def _template(value: Any, _: Values) -> Outcome:
    name = str(value)
    if name == "tokenizer_default" or name.startswith("tokenizer_default_fallback"):
        return Outcome()
    if name in _TEMPLATES:
        return Outcome({"data.template": _TEMPLATES[name]})
    if name == "jinja":
        return Outcome()  # chat_template_jinja says which
    return lost(
        f"there is no template {name}; data.template takes a Jinja file, and the tokenizer's own is used without"
    )


def _jinja(value: Any, _: Values) -> Outcome:
    if "{" in str(value):
        return lost("a template goes into a file of its own: data.template=FILE")
    return Outcome({"data.template": str(value)})


def _bits(value: Any, recipe: Values) -> Outcome:
    """Without a switch: 4 bits for qlora, 16 for lora."""
    if any(recipe.get(key) for key in ("load_in_4bit", "load_in_8bit", "gptq")):
        return Outcome()
    return Outcome({"bits": 4 if recipe.get("adapter") == "qlora" else value})


def _total(value: Any, recipe: Values) -> Outcome:
    return Outcome({ACCUMULATION: max(1, whole(value) // whole(recipe.get("micro_batch_size") or 1))})


def _memory(value: Any, _: Values) -> Outcome:
    if not isinstance(value, Mapping):
        return Outcome({"max_memory": f"{value}GiB" if isinstance(value, int) else str(value)})
    caps = [f"{gpu}={amount}" for gpu, amount in value.items() if str(gpu).isdecimal()]
    return Outcome({"max_memory": ",".join(caps)} if caps else {})


def _special_tokens(value: Any, _: Values) -> Outcome:
    if not isinstance(value, Mapping):
        return lost("special_tokens is a list of names with tokens")
    more = listed(value.get("additional_special_tokens") or [])
    others = [str(name) for name in value if name not in ("pad_token", "additional_special_tokens")]
    why = f"{', '.join(others)}: beginnings and ends are those of the tokenizer and its chat template"
    return Outcome({"new_tokens": more} if more else {}, (Remark("altered", why),) if others else ())


def _packing(value: Any, _: Values) -> Outcome:
    if value in OFF:
        return Outcome({"pack": False})
    why = "a sample is a packed row of sequence_len there; here a record is one, so a step has fewer tokens"
    return Outcome({"pack": True}, (Remark("altered", why),))


_KERNELS = (
    "flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "eager_attention",
    "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp",
    "flash_optimum", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "unsloth_cross_entropy_loss",
    "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o", "unsloth_rms_norm", "unsloth_rope", "liger_rope",
    "liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_fused_linear_cross_entropy",
    "liger_layer_norm", "liger_cross_entropy", "liger_geglu", "plugins", "batch_flattening",
)  # fmt: skip
_NOTHING = (
    "strict", "dataset_prepared_path", "model_type", "tokenizer_type", "tokenizer_use_fast", "processor_type",
    "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
    "dataset_processes", "dataset_keep_in_memory", "dataset_shard_num", "dataset_shard_idx", "skip_prepare_dataset",
    "push_dataset_to_hub", "hf_use_auth_token", "local_rank", "world_size", "ddp", "device", "gc_steps",
    "profiler_steps", "eval_table_size", "eval_max_new_tokens", "loss_watchdog_threshold", "loss_watchdog_patience",
    "debug", "auto_resume_from_checkpoints", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id",
    "wandb_log_model", "wandb_mode", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",
    "hf_mlflow_log_artifacts", "sample_packing_group_size", "sample_packing_bin_size",
    "sample_packing_sequentially", "eval_sample_packing", "pad_to_sequence_len", "multipack_real_batches",
    "shuffle_merged_datasets", "fsdp_final_state_dict_type", "fsdp_version", "bfloat16", "float16", "float32",
    "lora_fan_in_fan_out", "embeddings_skip_upcast", "mean_resizing_embeddings", "resize_token_embeddings_to_32x",
    "eval_strategy", "trl", "vllm", "ray_num_workers", "use_ray", "do_causal_lm_eval", "do_bench_eval",
    "base_model_config", "base_model_ignore_patterns", "tokenizer_legacy",
)  # fmt: skip


TABLE: dict[str, Rule] = {
    **TRAINER,
    **{key: anyhow("nothing to set") for key in _NOTHING},
    **{key: anyhow(f"{PLANNED} on kernels") for key in _KERNELS},
    "base_model": same("model"),
    "adapter": anyhow("by load_in_4bit and load_in_8bit"),
    "lora_model_dir": same("adapter"),
    "tokenizer_config": off("the tokenizer is the model's own"),
    "revision_of_model": off("models are of their newest revision"),
    "gptq": switched("method", "gptq-lora"),
    "bits": related("bits", _bits),
    "rl": off("answers are learned, not preferences"),
    "bnb_config_kwargs": off("quant.type and quant.double are set one by one"),
    "lora_r": same("lora.r"),
    "lora_target_modules": Rule(targets, "lora.targets", is_same=True),
    "lora_target_linear": related(
        "lora.targets", lambda value, _: Outcome({} if value in OFF else {"lora.targets": ["all-linear"]})
    ),
    "lora_target_parameters": off("experts get adapters by lora.targets=experts"),
    "lora_modules_to_save": TRAINER["modules_to_save"],
    "peft_use_rslora": switched("lora.variant", "rslora"),
    "peft_use_dora": TRAINER["use_dora"],
    "peft_init_lora_weights": TRAINER["init_lora_weights"],
    "peft_layers_to_transform": off("every layer gets an adapter"),
    "lora_layers_to_transform": off("every layer gets an adapter"),
    "loraplus_lr_ratio": same("optim.lr_ratio_b"),
    "loraplus_lr_embedding": off("embeddings are not adapted"),
    "relora_steps": off("ReLoRA is not there"),
    "lisa_n_layers": off("LISA is not there"),
    "lisa_step_interval": off("LISA is not there"),
    "unfrozen_parameters": TRAINER["modules_to_save"],
    "qat": off("training with rounded weights is not there"),
    "quantization": off("qdist quantize, for a model"),
    "datasets": related("data.path", lambda value, _: _entries(value, key="data.path")),
    "test_datasets": related("data.eval", _tests),
    "pretraining_dataset": related("data.path", lambda value, _: _entries(value, key="data.path")),
    "dataset_exact_deduplication": off("every record is learned; qdist data show counts duplicates"),
    "chat_template": related("data.template", _template),
    "chat_template_jinja": related("data.template", _jinja),
    "default_system_message": off("system messages are the records'"),
    "eot_tokens": off("the chat template ends a turn"),
    "special_tokens": related("new_tokens", _special_tokens),
    "tokens": related("new_tokens", lambda value, _: Outcome({"new_tokens": listed(value)})),
    "added_tokens_overrides": off("tokens keep their numbers"),
    "fix_untrained_tokens": off("rows of new tokens start at the mean"),
    "sequence_len": same("seq_len"),
    "sample_packing": Rule(_packing, "pack", is_same=True),
    "min_sample_len": off("short samples are learned too"),
    "curriculum_sampling": off("samples are drawn at random"),
    "excess_length_strategy": only(("truncate",), "long samples are cut"),
    "use_pose": off("positions are the model's own"),
    "s2_attention": off("attention is the model's own"),
    "rope_scaling": off("positions are the model's own"),
    "overrides_of_model_config": off("the model's configuration is its own"),
    "sequence_parallel_degree": only((1,), "a sequence lies on one GPU"),
    "context_parallel_size": only((1,), "a sequence lies on one GPU"),
    "tensor_parallel_size": only((1,), "GPUs share a backbone by placement"),
    "train_on_inputs": same("train.train_on_source"),
    "micro_batch_size": Rule(lambda value, _: Outcome({MICRO: whole(value)}), "micro_batch", is_same=True),
    "batch_size": Rule(_total, "global_batch", is_same=True),
    "num_epochs": unless_off("epochs"),
    "lr_scheduler": TRAINER["lr_scheduler_type"],
    "optimizer": TRAINER["optim"],
    "cosine_min_lr_ratio": off("the learning rate falls to 0"),
    "cosine_constant_lr_ratio": off("the learning rate falls from the end of the warmup"),
    "lr_groups": off("one learning rate, and that of B"),
    "embedding_lr": off("embeddings are not adapted"),
    "val_set_size": same("train.held_out"),
    "early_stopping_patience": related(
        "train.patience", lambda value, _: Outcome({} if value in OFF else {"train.patience": whole(value)})
    ),
    "evals_per_epoch": related("train.eval_steps", lambda value, _: Outcome({EVALS: number(value)} if value else {})),
    "saves_per_epoch": related("train.save_steps", lambda value, _: Outcome({SAVES: number(value)} if value else {})),
    "max_memory": related("", _memory),
    "gpu_memory_limit": related("max_memory", _memory),
    "use_tensorboard": switched("trackers", ["tensorboard"]),
    "use_wandb": switched("trackers", ["wandb"]),
    "use_mlflow": switched("trackers", ["mlflow"]),
    "wandb_project": switched("trackers", ["wandb"]),
}
"""Key -> what it is here."""
