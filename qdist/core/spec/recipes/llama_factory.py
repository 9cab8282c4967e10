"""What are the keys of a LLaMA-Factory recipe, `llamafactory-cli train FILE`?"""

from collections.abc import Mapping
from typing import Any

from qdist.core.spec.recipes.rules import (
    OFF,
    Outcome,
    Remark,
    Rule,
    Source,
    Values,
    among,
    anyhow,
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
)
from qdist.core.spec.recipes.trainer import PLANNED, TRAINER, targets

SIGNS = frozenset((
    "stage", "finetuning_type", "cutoff_len", "lora_rank", "lora_target", "template", "dataset_dir", "dataset",
    "val_size", "quantization_bit", "quantization_method", "preprocessing_num_workers", "overwrite_cache", "plot_loss",
    "flash_attn", "neat_packing", "max_samples", "double_quantization",
))  # fmt: skip
"""Keys by which its recipes are known."""
DEFAULTS: Values = {
    "learning_rate": 5e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3,
    "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "lora_rank": 8, "lora_alpha": None, "lora_dropout": 0.0,
    "lora_target": "all", "cutoff_len": 2048, "seed": 42, "val_size": 0.0, "quantization_bit": 16,
    "double_quantization": True,
}  # fmt: skip
"""What LLaMA-Factory takes for keys that a recipe leaves out, where it is not what qdist takes."""
DATA_SETS = "_data_sets"
"""What dataset_info.json says, by name, where it was found."""
_OWN_TEMPLATE = (
    "qwen", "qwen2_5", "qwen3", "qwen3_nothink", "phi", "phi4", "deepseek", "deepseek3", "deepseekr1", "glm4", "yi",
    "falcon", "cohere", "granite3", "gpt_oss", "internlm2", "llama4", "gemma3", "exaone", "olmo", "starchat",
    "default",
)  # fmt: skip
"""Templates after a model's own."""
_TEMPLATES = {
    **{name: name for name in ("alpaca", "vicuna", "chatml", "llama2", "llama3", "gemma", "mistral", "zephyr")},
    **{name: name for name in ("ziya", "aquila", "belle", "baichuan")}, "empty": "plain", "gemma2": "gemma",
}  # fmt: skip
_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "messages": "messages", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
"""Its name of a column -> ours."""
_ROLES = {
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"), "system_tag": ("system", "system"),
    "observation_tag": ("tool", "observation"), "function_tag": ("function_call", "function_call"),
}  # fmt: skip
"""Its name of a role -> ours, and what it takes where none is given."""


_TURNS = {"role_tag": ("role", ("from", "role")), "content_tag": ("content", ("value", "content"))}
"""Its name of a key of turns -> ours, and those that are detected."""


def refusal(recipe: Values) -> str:
    """Why the recipe is for another kind of training; empty if it is not."""
    stage, kind = recipe.get("stage", "sft"), recipe.get("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        return f"stage {stage} is not there; sft and pt are"
    if kind != "lora":
        return f"finetuning_type {kind} trains weights of the model; qdist trains adapters over a frozen backbone"
    return "do_train is false" if recipe.get("do_train") is False else ""


def _data(value: Any, recipe: Values, *, key: str = "data.path") -> Outcome:
    """Names in dataset_info.json, or files and hub ids where it was not found."""
    names, known = [str(name) for name in listed(value)], recipe.get(DATA_SETS)
    weights = [str(weight) for weight in listed(recipe.get("interleave_probs") or [])]
    count, sources = recipe.get("max_samples"), []
    readings = list[dict[str, Any]]()
    remarks = list[Remark]()
    for place, name in enumerate(names):
        entry = known.get(name) if isinstance(known, Mapping) else None
        if not isinstance(entry, Mapping):
            if "/" not in name and "." not in name:
                remarks.append(
                    Remark("lost", f"{name} is not in a dataset_info.json at dataset_dir; name its file in {key}")
                )
            entry = {"hf_hub_url": name}
        source = _source(entry, recipe)
        weight = weights[place] if len(weights) == len(names) else ""
        sources.append(str(source._replace(weight=weight, most=str(entry.get("num_samples") or count or ""))))
        readings.append(_columns(entry, is_text=recipe.get("stage") == "pt"))
        if readings[-1] != readings[0]:
            remarks.append(Remark("lost", f"{name} has other columns or roles than {names[0]}, whose are those of all"))
        if entry.get("ranking") is True:
            remarks.append(Remark("altered", f"{name} has preferences: the chosen answers are learned"))
    if count:
        remarks.append(Remark("altered", f"a set with fewer than {count} records is refused, and is taken whole there"))
    return Outcome({key: ",".join(sources), **(readings[0] if readings else {})}, tuple(remarks))


def _source(entry: Mapping[str, Any], recipe: Values) -> Source:
    """Where the records of an entry of dataset_info.json are."""
    file = entry.get("file_name")
    name = (
        f"{recipe.get('dataset_dir', 'data')}/{file}"
        if file
        else next(
            (str(entry[key]) for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url") if entry.get(key)), ""
        )
    )
    return Source(name, str(entry.get("subset") or ""), str(entry.get("split") or ""))


def _columns(entry: Mapping[str, Any], *, is_text: bool) -> dict[str, Any]:
    """Settings for columns and roles that have other names than those that are detected."""
    columns, tags = mapping(entry.get("columns"), "columns"), mapping(entry.get("tags"), "tags")
    names = {"prompt": "text"} if is_text else _COLUMNS
    ours = pairs({own: columns.get(theirs) for theirs, own in names.items()})
    holder = "messages" if columns.get("messages") else "conversations"
    named = {
        f"{holder}.{own}": tags[tag] for tag, (own, known) in _TURNS.items() if tags.get(tag, known[0]) not in known
    }
    ours += pairs(named)
    roles = pairs({own: tags[tag] for tag, (own, usual) in _ROLES.items() if tags.get(tag, usual) != usual})
    return {**({"data.columns": ours} if ours else {}), **({"data.roles": roles} if roles else {})}


def _template(value: Any, _: Values) -> Outcome:
    name = str(value)
    if name in _TEMPLATES:
        return Outcome({"data.template": _TEMPLATES[name]})
    if name in _OWN_TEMPLATE:
        return Outcome(remarks=(Remark("altered", "the tokenizer's own chat template is used"),))
    return lost(
        f"there is no template {name}; data.template takes a Jinja file, and the tokenizer's own is used without"
    )


def _alpha(value: Any, recipe: Values) -> Outcome:
    return Outcome({"lora.alpha": 2 * number(recipe["lora_rank"]) if value is None else value})


def _packing(value: Any, recipe: Values) -> Outcome:
    if value in OFF:
        return Outcome({} if recipe.get("neat_packing") else {"pack": False})
    apart = Remark("altered", "samples in a row do not see each other")
    why = "a sample is a packed row of cutoff_len there; here a record is one, so a step has fewer tokens"
    neat = recipe.get("neat_packing")
    return Outcome({"pack": True}, (Remark("altered", why), *(() if neat else (apart,))))


def _last_only(value: Any, _: Values) -> Outcome:
    return Outcome() if value in OFF else lost("every answer of a conversation is learned, not its last alone")


TABLE: dict[str, Rule] = {
    **TRAINER,
    "stage": Rule(lambda value, _: Outcome({"format": "text"} if value == "pt" else {})),
    "finetuning_type": anyhow("LoRA is what is trained", "method"),
    "model_name_or_path": same("model"),
    "adapter_name_or_path": same("adapter"),
    "model_revision": only(("main",), "models are of their newest revision"),
    "create_new_adapter": off("an adapter is trained further, not merged first"),
    "quantization_bit": same("bits"),
    "quantization_type": same("quant.type"),
    "double_quantization": same("quant.double"),
    "quantization_method": among("method", {word: {} for word in ("bnb", "bitsandbytes")}),
    "quantization_device_map": anyhow(f"{PLANNED} on the placement"),
    "infer_dtype": anyhow("nothing to set"),
    "lora_rank": same("lora.r"),
    "lora_alpha": Rule(_alpha, "lora.alpha", is_same=True),
    "lora_target": Rule(targets, "lora.targets", is_same=True),
    "additional_target": TRAINER["modules_to_save"],
    "loraplus_lr_ratio": same("optim.lr_ratio_b"),
    "use_rslora": switched("lora.variant", "rslora"),
    "pissa_init": off("B starts at zero; PiSSA is not there"),
    "pissa_iter": anyhow("of PiSSA"),
    "pissa_convert": anyhow("of PiSSA"),
    "use_galore": off("GaLore is not there"),
    "use_badam": off("BAdam is not there"),
    "use_apollo": off("APOLLO is not there"),
    "use_adam_mini": off("Adam-mini is not there"),
    "use_muon": off("Muon is not there"),
    "use_llama_pro": off("LLaMA Pro is not there"),
    "use_asft_loss": off("the loss is the negative log-likelihood"),
    "use_dft_loss": off("the loss is the negative log-likelihood"),
    "pure_bf16": anyhow("the adapter is float32"),
    "upcast_layernorm": anyhow("norms compute in float32"),
    "upcast_lmhead_output": anyhow("the loss is computed in float32"),
    "rope_scaling": off("positions are the model's own"),
    "shift_attn": off("attention is the model's own"),
    "mixture_of_depths": off("mixture of depths is not there"),
    "use_unsloth": anyhow("kernels are qdist's own"),
    "use_unsloth_gc": anyhow(PLANNED),
    "enable_liger_kernel": same("liger"),
    "flash_attn": anyhow(f"{PLANNED} on kernels"),
    "disable_gradient_checkpointing": anyhow(PLANNED),
    "resize_vocab": anyhow("rows are added for new tokens"),
    "new_special_tokens": related("new_tokens", lambda value, _: Outcome({"new_tokens": listed(value)})),
    "add_special_tokens": related("new_tokens", lambda value, _: Outcome({"new_tokens": listed(value)})),
    "add_tokens": related("new_tokens", lambda value, _: Outcome({"new_tokens": listed(value)})),
    "dataset": Rule(_data, "data.path", is_same=True),
    "eval_dataset": Rule(lambda value, recipe: _data(value, recipe, key="data.eval"), "data.eval", is_same=True),
    "dataset_dir": anyhow("a part of data.path"),
    "media_dir": anyhow("images are not there"),
    "template": Rule(_template),
    "cutoff_len": same("seq_len"),
    "train_on_prompt": same("train.train_on_source"),
    "mask_history": Rule(_last_only),
    "streaming": anyhow("records are always streamed"),
    "buffer_size": anyhow("nothing to set"),
    "mix_strategy": only(("concat", "interleave_over"), "records of a set that is used up begin anew"),
    "interleave_probs": anyhow("a part of data.path"),
    "max_samples": anyhow("a part of data.path"),
    "overwrite_cache": anyhow("a cache is known by what it was made of"),
    "preprocessing_batch_size": anyhow("nothing to set"),
    "preprocessing_num_workers": anyhow("nothing to set"),
    "tokenized_path": anyhow("the cache has its own place"),
    "ignore_pad_token_for_loss": only((True,), "padding is never learned"),
    "val_size": same("train.held_out"),
    "eval_on_each_dataset": anyhow("nothing to set"),
    "default_system": off("system messages are the records'"),
    "packing": Rule(_packing, "pack", is_same=True),
    "neat_packing": Rule(
        lambda value, recipe: Outcome() if value in OFF else _packing(value, recipe), "pack", is_same=True
    ),
    "tool_format": off("tools are written by the chat template"),
    "enable_thinking": off("thoughts are the records'"),
    "eval_strategy": anyhow("by train.eval_steps"),
    "predict_with_generate": anyhow("qdist evaluate RUN --tasks generate:FILE"),
    "compute_accuracy": anyhow("qdist evaluate RUN"),
    "do_eval": anyhow("qdist evaluate RUN"),
    "do_predict": anyhow("qdist generate RUN"),
    "plot_loss": anyhow("qdist report RUN"),
    "include_effective_tokens_per_second": anyhow("always measured"),
    "cache_dir": anyhow("QDIST_CACHE, in the environment"),
    "use_fast_tokenizer": anyhow("nothing to set"),
    "hf_hub_token": anyhow("HF_TOKEN, in the environment"),
    "ms_hub_token": anyhow("nothing to set"),
    "offload_folder": anyhow("nothing to set"),
    "use_swanlab": off("trackers are tensorboard, wandb, mlflow and trackio"),
    "ray_run_name": anyhow("nothing to set"),
    "ray_num_workers": anyhow("--gpus"),
    "low_cpu_mem_usage": TRAINER["low_cpu_mem_usage"],
    "freeze_vision_tower": anyhow("towers are left out"),
    "freeze_multi_modal_projector": anyhow("towers are left out"),
    "image_max_pixels": anyhow("images are not there"),
    "video_max_pixels": anyhow("images are not there"),
}
"""Key -> what it is here."""
