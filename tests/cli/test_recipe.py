"""Do recipes of Axolotl, LLaMA-Factory and TRL become recipes that qdist plans, with every other key named?"""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.core.model.aliases import config_of

AXOLOTL_QLORA = """
base_model: MODEL
load_in_4bit: true
adapter: qlora
strict: false
datasets:
  - path: DATA
    type: alpaca
val_set_size: 0.25
output_dir: ./outputs/qlora
sequence_len: 128
sample_packing: false
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
max_steps: 20
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
save_steps: 10
weight_decay: 0.01
special_tokens:
  pad_token: "<pad>"
"""
AXOLOTL_8BIT = """
base_model: MODEL
load_in_8bit: true
adapter: lora
datasets:
  - path: json
    data_files: [DATA]
    type:
      field_instruction: instruction
      field_input: input
      field_output: output
chat_template: chatml
train_on_inputs: true
sequence_len: 64
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
peft_use_rslora: true
micro_batch_size: 4
num_epochs: 2
lr_scheduler: constant
warmup_steps: 5
learning_rate: 0.0001
optimizer: adamw_torch
group_by_length: true
use_tensorboard: true
loraplus_lr_ratio: 16
"""
AXOLOTL_CHAT = """
base_model: MODEL
adapter: qlora
load_in_4bit: true
datasets:
  - path: CHATS
    type: chat_template
    field_messages: messages
    message_property_mappings: {role: role, content: content}
    roles: {user: [human], assistant: [gpt], tool: [function]}
test_datasets: [{path: CHATS, type: chat_template}]
sequence_len: 64
sample_packing: true
lora_r: 4
lora_alpha: 8
lora_target_linear: true
micro_batch_size: 1
gradient_accumulation_steps: 2
max_steps: 12
warmup_steps: 3
eval_steps: 4
early_stopping_patience: 2
lr_scheduler: linear
optimizer: adamw_bnb_8bit
learning_rate: 0.0003
deepspeed: deepspeed_configs/zero3_bf16.json
"""
FACTORY_SFT = """
### model
model_name_or_path: MODEL
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: mine
dataset_dir: SETS
template: llama3
cutoff_len: 128
max_samples: 10
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/lora
logging_steps: 10
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
max_steps: 30
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 10
"""
FACTORY_JSON = json.dumps(
    {
        "model_name_or_path": "MODEL", "finetuning_type": "lora", "quantization_bit": 8, "dataset": "asked,chats",
        "dataset_dir": "SETS", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3", "template": "qwen3",
        "lora_target": "q_proj,v_proj", "lora_rank": 4, "cutoff_len": 64, "num_train_epochs": 1, "optim": "adamw_torch",
        "use_rslora": True, "report_to": "tensorboard", "train_on_prompt": True,
    },
    indent="\t",
)  # fmt: skip
FACTORY_TEXT = """
model_name_or_path: MODEL
stage: pt
finetuning_type: lora
quantization_bit: 4
quantization_type: fp4
double_quantization: false
dataset: TEXTS
cutoff_len: 64
lora_rank: 16
lora_alpha: 8
lora_dropout: 0.1
lora_target: q_proj
packing: true
neat_packing: true
per_device_train_batch_size: 2
max_steps: 5
lr_scheduler_type: constant
warmup_ratio: 0.1
flash_attn: fa2
use_unsloth: true
loraplus_lr_ratio: 4
"""
TRL_SFT = """
model_name_or_path: MODEL
dataset_name: DATA
learning_rate: 2.0e-4
max_steps: 10
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
assistant_only_loss: true
use_peft: true
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
output_dir: out
push_to_hub: true
max_length: 64
report_to: none
"""
TRL_8BIT = """
model_name_or_path: MODEL
dataset_name: DATA
dataset_text_field: output
use_peft: true
load_in_8bit: true
lora_target_modules: [q_proj, k_proj]
num_train_epochs: 1
max_length: 32
packing: true
packing_strategy: bfd
completion_only_loss: false
lr_scheduler_type: cosine
warmup_steps: 2
optim: paged_adamw_8bit
seed: 7
max_grad_norm: 0.5
"""
TRL_16BIT = """
datasets:
  - path: DATA
  - path: CHATS
use_peft: true
model_name_or_path: MODEL
dtype: bfloat16
attn_implementation: flash_attention_2
completion_only_loss: true
max_length: 32
max_steps: 4
adam_beta2: 0.95
weight_decay: 0.1
save_total_limit: 3
"""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "axolotl-qlora": (AXOLOTL_QLORA, "axolotl", {
        "bits": 4, "global_batch": 8, "steps": 20, "seq_len": 128, "pack": False, "run": "./outputs/qlora",
        "lora.targets": ["all-linear"], "lora.r": 8, "optim.name": "adamw", "optim.lr": 2e-4, "optim.clip": 1.0,
        "optim.warmup_steps": 2, "train.held_out": 0.25, "data.template": "alpaca", "optim.weight_decay": 0.01,
        "train.save_steps": 10,
    }),
    "axolotl-8bit": (AXOLOTL_8BIT, "axolotl", {
        "bits": 8, "global_batch": 4, "epochs": 2.0, "data.template": "chatml", "train.train_on_source": True,
        "lora.variant": "rslora", "lora.targets": ["q_proj", "v_proj"], "optim.lr_ratio_b": 16.0, "format": "alpaca",
        "trackers": ["tensorboard"], "optim.name": "adamw",
    }),
    "axolotl-chat": (AXOLOTL_CHAT, "axolotl", {
        "pack": True, "global_batch": 2, "train.eval_steps": 4, "train.patience": 2,
        "optim.name": "adamw-8bit", "optim.schedule": "linear", "optim.warmup_steps": 3,
    }),
    "factory-sft": (FACTORY_SFT, "llama-factory", {
        "data.columns": ["instruction=question", "output=reply"], "data.template": "llama3", "global_batch": 8,
        "optim.warmup_steps": 3, "steps": 30, "optim.lr": 1e-4, "seed": 42, "train.held_out": 0.1,
    }),
    "factory-json": (FACTORY_JSON, "llama-factory", {
        "bits": 8, "global_batch": 8, "lora.alpha": 8.0, "lora.variant": "rslora", "optim.schedule": "linear",
        "optim.lr": 5e-5, "trackers": ["tensorboard"], "train.train_on_source": True,
    }),
    "factory-text": (FACTORY_TEXT, "llama-factory", {
        "quant.type": "fp4", "quant.double": False, "format": "text",
        "lora.dropout": 0.1, "pack": True, "optim.lr_ratio_b": 4.0,
    }),
    "trl-sft": (TRL_SFT, "trl", {
        "lora.r": 32, "lora.dropout": 0.05, "global_batch": 16, "quant.double": False, "train.held_out": 0.0,
    }),
    "trl-8bit": (TRL_8BIT, "trl", {
        "bits": 8, "optim.lr": 2e-5, "data.columns": ["text=output"], "optim.name": "adamw-8bit", "seed": 7,
        "lora.alpha": 32.0, "train.train_on_source": True, "optim.warmup_steps": 2, "optim.clip": 0.5,
    }),
    "trl-16bit": (TRL_16BIT, "trl", {
        "bits": 16, "dtype": "bfloat16", "lora.targets": ["q_proj", "v_proj"], "lora.r": 16, "optim.beta2": 0.95,
        "train.keep": 3, "global_batch": 8,
    }),
}  # fmt: skip


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="qdist")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, on a machine without GPUs, with a small model and records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({**config_of("smollm2-135m"), "num_hidden_layers": 2}))
    (tmp_path / "model/model.safetensors").touch()
    record = {"instruction": "Say it.", "input": "", "output": "It."}
    (tmp_path / "data.jsonl").write_text((json.dumps(record) + "\n") * 20)
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    (tmp_path / "texts.jsonl").write_text((json.dumps({"text": "Say it."}) + "\n") * 20)
    (tmp_path / "sets").mkdir()
    asked = {"question": "Say it.", "reply": "It."}
    (tmp_path / "sets/mine.jsonl").write_text((json.dumps(asked) + "\n") * 20)
    (tmp_path / "sets/asked.jsonl").write_text((tmp_path / "data.jsonl").read_text())
    (tmp_path / "sets/chats.jsonl").write_text((tmp_path / "chats.jsonl").read_text())
    mine = {"file_name": "mine.jsonl", "columns": {"prompt": "question", "response": "reply"}}
    chats = {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    (tmp_path / "sets/dataset_info.json").write_text(
        json.dumps({"mine": mine, "chats": chats, "asked": {"file_name": "asked.jsonl"}})
    )
    return tmp_path


def written(here: Path, text: str, name: str = "theirs.yml") -> str:
    for word, path in (
        ("MODEL", "model"),
        ("DATA", "data.jsonl"),
        ("CHATS", "chats.jsonl"),
        ("TEXTS", "texts.jsonl"),
        ("SETS", "sets"),
    ):
        text = text.replace(word, path)
    (here / name).write_text(text)
    return name


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_of_another_program_is_converted_and_planned(case: str, here: Path) -> None:
    text, _, expected = CASES[case]
    theirs = written(here, text, "theirs.json" if text.startswith("{") else "theirs.yml")
    result = qdist("convert", "recipe", theirs, "--out", "ours.toml")
    assert result.exit_code == 0, result.output
    ours = flat(tomllib.loads((here / "ours.toml").read_text()))
    assert {key: ours.get(key) for key in expected} == expected
    assert ours["model"] == "model"
    planned = qdist("launch", "ours.toml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "adapter" in planned.output


@pytest.mark.parametrize("case", CASES)
def test_the_program_is_told_by_the_keys_of_its_recipe(case: str, here: Path) -> None:
    text, program, _ = CASES[case]
    told = qdist("convert", "recipe", written(here, text, "x.json" if text.startswith("{") else "x.yml"))
    stated = qdist("convert", "recipe", "x.json" if text.startswith("{") else "x.yml", "--from", program)
    assert told.stdout == stated.stdout
    assert told.exit_code == 0


@pytest.mark.parametrize(
    ("case", "line", "named"),
    [
        ("axolotl-qlora", "neftune_noise_alpha: 5", "neftune_noise_alpha: noise in the embeddings"),
        ("axolotl-qlora", "lora_modules_to_save: [lm_head]", "lora_modules_to_save: only adapters are trained"),
        (
            "axolotl-qlora",
            "lora_drop_out: 0.1",
            "lora_drop_out: no key of Axolotl that qdist knows; lora_dropout is one",
        ),
        ("axolotl-qlora", "lisa_n_layers: 4", "lisa_n_layers: LISA is not there"),
        ("axolotl-qlora", "chat_template: phi_3", "chat_template: there is no template phi_3"),
        ("factory-sft", "use_dora: true", "use_dora: adapters are LoRA, rsLoRA and QA-LoRA, not DoRA"),
        ("factory-sft", "optim: lion_8bit", "optim: optim.name has forms of AdamW, not lion_8bit"),
        ("factory-sft", "mask_history: true", "mask_history: every answer of a conversation is learned"),
        ("trl-sft", "lora_modules_to_save: [embed_tokens]", "lora_modules_to_save: only adapters"),
        ("trl-sft", "lr_scheduler_type: cosine_with_restarts", "lr_scheduler_type: optim.schedule has constant"),
        ("trl-sft", "loss_type: dft", "loss_type: the loss is the negative log-likelihood"),
    ],
)
def test_a_key_that_training_depends_on_is_named_and_refused_unless_lossy(
    case: str, line: str, named: str, here: Path
) -> None:
    text = CASES[case][0].rstrip() + f"\n{line}\n"
    theirs = written(here, text)
    number = text.rstrip().count("\n") + 1
    result = qdist("convert", "recipe", theirs, "--out", "ours.toml")
    assert result.exit_code == 2
    assert f"lost     line {number}, {named}" in result.stderr
    assert "1 key that training depends on cannot be honoured" in result.stderr
    assert not (here / "ours.toml").exists()
    assert qdist("convert", "recipe", theirs, "--out", "ours.toml", "--lossy").exit_code == 0
    assert f"#   line {number}, {named}" in (here / "ours.toml").read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("base_model: m\nadapter: qlora\ndatasets: []\nrl: dpo\n", "rl: dpo learns from preferences"),
        ("base_model: m\ndatasets: []\nmicro_batch_size: 1\n", "adapter is not set"),
        ("model_name_or_path: m\nstage: dpo\nfinetuning_type: lora\n", "stage dpo is not there"),
        ("model_name_or_path: m\nstage: sft\nfinetuning_type: full\n", "finetuning_type full trains weights"),
        ("model_name_or_path: m\ndataset_name: d\nmax_length: 512\n", "use_peft is not set"),
    ],
)
def test_a_recipe_for_another_kind_of_training_is_refused_even_where_lossy(text: str, why: str, here: Path) -> None:
    result = qdist("convert", "recipe", written(here, text), "--lossy")
    assert result.exit_code == 2
    assert "theirs.yml is not a recipe for quantized LoRA: " in result.stderr
    assert why in result.stderr


def test_shares_of_the_steps_need_their_number(here: Path) -> None:
    theirs = written(here, AXOLOTL_QLORA.replace("max_steps: 20", "num_epochs: 2\nevals_per_epoch: 4"))
    refused = qdist("convert", "recipe", theirs)
    assert refused.exit_code == 2
    assert "try: --steps N, the optimizer steps of the run" in refused.stderr
    result = qdist("convert", "recipe", theirs, "--steps", "80")
    ours = flat(tomllib.loads(result.stdout))
    assert (ours["optim.warmup_steps"], ours["train.eval_steps"], ours["epochs"]) == (8, 10, 2.0)
    assert "steps" not in ours


def test_gpus_multiply_the_batch_and_share_what_deepspeed_shares(here: Path) -> None:
    theirs = written(here, AXOLOTL_QLORA + "deepspeed: deepspeed_configs/zero2.json\n")
    ours = flat(tomllib.loads(qdist("convert", "recipe", theirs, "--gpus", "4").stdout))
    assert (ours["global_batch"], ours["gpus"], ours["zero.stage"]) == (32, 4, 2)
    theirs = written(here, AXOLOTL_QLORA + "fsdp: [full_shard]\n")
    assert flat(tomllib.loads(qdist("convert", "recipe", theirs, "--gpus", "4").stdout))["placement"] == "shard"


def test_data_sets_of_llama_factory_keep_their_weights_and_places(here: Path) -> None:
    written(here, FACTORY_JSON, "theirs.json")
    result = qdist("convert", "recipe", "theirs.json")
    data = tomllib.loads(result.stdout)["data"]
    assert data["path"] == "sets/asked.jsonl:0.7,sets/chats.jsonl:0.3"
    assert "altered" not in result.stdout
    assert "#   line 9, template: the tokenizer's own chat template is used" in result.stdout


def test_columns_that_only_some_data_sets_of_llama_factory_have_are_named(here: Path) -> None:
    written(here, FACTORY_JSON.replace("asked,chats", "mine,chats"), "theirs.json")
    result = qdist("convert", "recipe", "theirs.json")
    assert result.exit_code == 2
    assert "chats has other columns or roles than mine, whose are those of all" in result.stderr


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ("message_property_mappings: {role: who, content: value}", {"columns": ["messages.role=who"]}),
        ("message_field_content: said", {"columns": ["messages.content=said"]}),
        ("roles: {user: [human, user], assistant: [Agent, gpt]}", {"roles": ["assistant=Agent"]}),
        ("roles: {tool: [function], user: [user]}", {}),
    ],
)
def test_turns_of_axolotl_keep_their_keys_and_roles(entry: str, data: dict[str, Any], here: Path) -> None:
    first, second = "message_property_mappings: {role: role", "    roles: {user: [human]"
    lines = [line for line in AXOLOTL_CHAT.splitlines() if not line.startswith(("test_datasets", second))]
    lines.remove("early_stopping_patience: 2")
    lines = [f"    {entry}" if line.strip().startswith(first) else line for line in lines]
    result = qdist("convert", "recipe", written(here, "\n".join(lines)))
    assert result.exit_code == 0, result.output
    found = tomllib.loads(result.stdout)["data"]
    assert {key: found.get(key) for key in ("columns", "roles") if key in found} == data


OTHER = "t.jsonl has another format or other columns than chats.jsonl"


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        (
            "{user: [human]",
            "{user: [Customer, Client]",
            "user has the names Customer, Client, and data.roles takes one",
        ),
        ("[{path: CHATS, type: chat_template}]", "[{path: t.jsonl, type: alpaca}]", OTHER),
        ("test_datasets", "  - {path: t.jsonl, type: chat_template, field_messages: log}\ntest_datasets", OTHER),
    ],
)
def test_what_only_some_sets_of_axolotl_have_is_named(before: str, after: str, lost: str, here: Path) -> None:
    result = qdist("convert", "recipe", written(here, AXOLOTL_CHAT.replace(before, after)))
    assert result.exit_code == 2
    assert lost in result.stderr


@pytest.mark.parametrize(
    ("messages", "columns"),
    [
        ({}, ["conversations.role=who", "conversations.content=said"]),
        ({"columns": {"messages": "log"}}, ["messages=log", "messages.role=who", "messages.content=said"]),
    ],
)
def test_turns_of_llama_factory_keep_their_keys_and_roles(
    messages: dict[str, Any], columns: list[str], here: Path
) -> None:
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "Customer", "function_tag": "act"}
    entry = {"file_name": "mine.jsonl", "formatting": "sharegpt", "tags": tags, **messages}
    (here / "sets/dataset_info.json").write_text(json.dumps({"mine": entry}))
    result = qdist("convert", "recipe", written(here, FACTORY_SFT))
    assert result.exit_code == 0, result.output
    data = tomllib.loads(result.stdout)["data"]
    assert (data["columns"], data["roles"]) == (columns, ["user=Customer", "function_call=act"])


def test_a_data_set_that_no_list_has_is_named(here: Path) -> None:
    result = qdist("convert", "recipe", written(here, FACTORY_SFT.replace("dataset: mine", "dataset: identity")))
    assert result.exit_code == 2
    assert "dataset: identity is not in a dataset_info.json at dataset_dir" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("just words", "does not hold keys with values"),
        ("a: [1, 2", "is not YAML"),
        ("a: 1\na: 2\n", "has a in line 1 and in line 2"),
        ("a: &x [*x]\n", "is not YAML"),
        ("a: " + "[" * 2000, "is not YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("dataset: a\ndataset_name: b\n", "has as many keys of llama-factory as of trl"),
        ("nothing: 1\n", "has none of the keys of axolotl, llama-factory, trl"),
        (AXOLOTL_QLORA.replace("2e-4", "fast"), "optim.lr cannot be 'fast'"),
        (AXOLOTL_QLORA.replace("batch_size: 2", "batch_size: two"), "micro_batch_size: 'two' is not a number"),
        (AXOLOTL_QLORA.replace("  - path: DATA\n    type: alpaca", "  - [1, 2]"), "an entry of datasets is not a list"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_in_two_lines(text: str, said: str, here: Path) -> None:
    result = qdist("convert", "recipe", written(here, text))
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_a_recipe_that_is_there_is_never_overwritten(here: Path) -> None:
    (here / "ours.toml").write_text("mine")
    result = qdist("convert", "recipe", written(here, AXOLOTL_QLORA), "--out", "ours.toml")
    assert (result.exit_code, (here / "ours.toml").read_text()) == (2, "mine")


def test_the_word_recipe_has_a_help_of_its_own() -> None:
    result = qdist("convert", "recipe", "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: qdist convert recipe [OPTIONS] FILE")
