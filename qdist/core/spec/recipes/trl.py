"""What are the keys of a TRL recipe, `trl sft --config FILE`: ScriptArguments, ModelConfig and SFTConfig?"""

from typing import Any

from qdist.core.spec.recipes.rules import (
    OFF,
    Outcome,
    Remark,
    Rule,
    Source,
    Values,
    anyhow,
    entries,
    lost,
    off,
    only,
    pairs,
    related,
    same,
)
from qdist.core.spec.recipes.trainer import PLANNED, TRAINER, targets

SIGNS = frozenset((
    "use_peft", "dataset_name", "dataset_train_split", "dataset_test_split", "lora_target_modules", "max_length",
    "max_seq_length", "use_bnb_nested_quant", "eval_strategy", "dataset_text_field", "packing_strategy",
    "assistant_only_loss", "completion_only_loss", "model_init_kwargs", "dataset_config", "lora_r", "lora_task_type",
))  # fmt: skip
"""Keys by which its recipes are known."""
DEFAULTS: Values = {
    "learning_rate": 2e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3,
    "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
    "lora_target_modules": "q_proj,v_proj", "use_bnb_nested_quant": False, "max_length": 1024, "seed": 42,
    "eval_strategy": "no", "bits": 16, "assistant_only_loss": False,
}  # fmt: skip
"""What TRL takes for keys that a recipe leaves out, where it is not what qdist takes. bits: of load_in_4bit."""


def refusal(recipe: Values) -> str:
    """Why the recipe is for another kind of training; empty if it is not."""
    if recipe.get("use_peft") in OFF:
        return "use_peft is not set, and so all weights would be trained; qdist trains adapters over a frozen backbone"
    return ""


def _data(value: Any, recipe: Values) -> Outcome:
    split = str(recipe.get("dataset_train_split") or "")
    return Outcome({"data.path": str(Source(str(value), str(recipe.get("dataset_config") or ""), split))})


def _mixture(value: Any, recipe: Values) -> Outcome:
    """The list `datasets` of recipes with several sets, or of one."""
    sets = entries(value, "datasets")
    known = {"path", "name", "split", "data_dir", "data_files", "columns"}
    if strange := sorted({key for each in sets for key in each} - known):
        return lost(f"{strange[0]} of an entry is not read")
    sources = [
        Source(str(each.get("path")), str(each.get("name") or ""), str(each.get("split") or "")) for each in sets
    ]
    return Outcome({"data.path": ",".join(map(str, sources))})


def _evaluated(value: Any, recipe: Values) -> Outcome:
    """`eval_strategy`: without it nothing is evaluated; with it the test split is."""
    if value in OFF:
        return Outcome({"train.held_out": 0})
    name, subset = recipe.get("dataset_name"), str(recipe.get("dataset_config") or "")
    split = str(recipe.get("dataset_test_split") or "test")
    return Outcome({"data.eval": str(Source(str(name), subset, split))} if name else {})


def _learned(value: Any, recipe: Values) -> Outcome:
    """`assistant_only_loss`, which is off by default: the loss is on all of a conversation then."""
    if value not in OFF or recipe.get("completion_only_loss"):
        return Outcome()
    why = (
        "TRL then learns every token of messages and text, and of prompt and completion the completion alone; answers "
        "alone are learned here, unless train.train_on_source=true"
    )
    return Outcome(remarks=(Remark("altered", why),))


def _completions(value: Any, recipe: Values) -> Outcome:
    return Outcome({"train.train_on_source": True}) if value is False else Outcome()


def _packing(value: Any, recipe: Values) -> Outcome:
    if value in OFF:
        return Outcome({"pack": False})
    why = "a sample is a packed row of max_length there; here a record is one, so a step has fewer tokens"
    return Outcome({"pack": True}, (Remark("altered", why),))


TABLE: dict[str, Rule] = {
    **TRAINER,
    "model_name_or_path": same("model"),
    "model_revision": only(("main",), "models are of their newest revision"),
    "dtype": TRAINER["torch_dtype"]._replace(setting="", is_same=False),
    "use_peft": anyhow("adapters are what is trained"),
    "lora_r": same("lora.r"),
    "lora_target_modules": Rule(targets, "lora.targets", is_same=True),
    "lora_modules_to_save": off("only adapters are trained, and rows of new tokens"),
    "lora_target_parameters": off("experts get adapters by lora.targets=experts"),
    "lora_task_type": only(("CAUSAL_LM",), "models are causal language models"),
    "use_bnb_nested_quant": Rule(lambda value, _: Outcome({"quant.double": value}), "quant.double", is_same=True),
    "bits": related(
        "bits",
        lambda value, recipe: Outcome(
            {"bits": value} if all(recipe.get(key) in OFF for key in ("load_in_4bit", "load_in_8bit")) else {}
        ),
    ),
    "dataset_name": related("data.path", _data),
    "datasets": related("data.path", _mixture),
    "dataset_config": anyhow("a part of data.path"),
    "dataset_train_split": anyhow("a part of data.path"),
    "dataset_test_split": anyhow("a part of data.eval"),
    "dataset_streaming": anyhow("records are always streamed"),
    "dataset_text_field": related(
        "data.columns",
        lambda value, _: Outcome({"data.columns": columns} if (columns := pairs({"text": value})) else {}),
    ),
    "dataset_kwargs": off("records are always prepared"),
    "eval_strategy": related("train.eval_steps", _evaluated),
    "evaluation_strategy": related("train.eval_steps", _evaluated),
    "ignore_bias_buffers": anyhow("nothing to set"),
    "gradient_checkpointing_use_reentrant": anyhow("nothing to set"),
    "max_length": same("seq_len"),
    "max_seq_length": same("seq_len"),
    "truncation_mode": only(("keep_start",), "the end of a long sample is cut, not its beginning"),
    "packing": Rule(_packing, "pack", is_same=True),
    "eval_packing": anyhow(PLANNED),
    "packing_strategy": only(("bfd", "ffd"), "packed samples are kept apart and whole"),
    "padding_free": anyhow("packed rows have no padding"),
    "pad_to_multiple_of": anyhow(PLANNED),
    "pad_token": anyhow("chosen where the tokenizer has none"),
    "eos_token": off("what ends an answer is the chat template's"),
    "chat_template_path": same("data.template"),
    "completion_only_loss": related("train.train_on_source", _completions),
    "assistant_only_loss": related("train.train_on_source", _learned),
    "activation_offloading": anyhow(PLANNED),
    "shuffle_dataset": anyhow("samples are always drawn at random"),
    "model_init_kwargs": off("models are opened by qdist"),
    "fp16_full_eval": anyhow("nothing to set"),
    "bf16_full_eval": anyhow("nothing to set"),
}
"""Key -> what it is here."""
