"""Is every setting honoured or refused, by a message that helps?"""

import tomllib
from typing import Any

import msgspec
import pytest

from qdist.core.errors import SpecError
from qdist.core.spec.recipe import to_toml
from qdist.core.spec.run_spec import RunSpec, known_keys, memory_cap_of, nest, parse_assignment, resolve, unknown_key
from qdist.core.spec.sections import Data, Lora, Optim, Quant, Split, Train, Zero
from qdist.core.text import GIB

OTHER = RunSpec(
    trust_remote_code=True,
    model='a "quoted" \\ folder/Modèle 模型\t',
    bits=4,
    data=Data(
        path="C:\\data\nfile\u007f.jsonl", eval="b.jsonl", columns=("instruction=q",), roles=("user=A b",),
        template="zephyr",
        skip_bad=2, source_max_len=16, target_max_len=512,
    ),
    format="sharegpt",
    adapter="runs/one, two",
    run="runs/naïve 'one'",
    gpus=4,
    placement="split",
    gpus_per_group=2,
    max_memory="23.5GiB",
    load_format="dummy",
    dtype="bfloat16",
    compute="fp8",
    seq_len=1000,
    micro_batch=4,
    global_batch=24,
    steps=7,
    seed=2**63 - 1,
    liger=False,
    pack=False,
    graphs=False,
    new_tokens=("<|a b|>", 'say "ü"', "\\n"),
    trackers=("wandb", "tensorboard"),
    lora=Lora(r=8, variant="rslora", alpha=0.1, dropout=0.05, targets=("q_proj", "v_proj")),
    quant=Quant(type="fp4", double=False),
    optim=Optim(
        name="adamw", lr=1e-30, lr_ratio_b=16.0, schedule="cosine", warmup_steps=5, beta1=0.85, beta2=0.95, eps=1e16,
        weight_decay=0.01, clip=0.0,
    ),
    zero=Zero(stage=2, offload="cpu"),
    split=Split(schedule="sequential", offload_layers=3),
    train=Train(
        tasks=("mmlu:a b.jsonl",), best="loss", patience=3, checkpointing=False, held_out=0,
        eval_steps=11, save_steps=13, keep=5, train_on_source=True, answers=3
    ),
)  # fmt: skip
"""Every field is another than its default, but for `epochs`, which contradicts `steps`, those of GPTQ, which go without
`quant.type`, and `train.verify_steps`, which needs a sharded backbone."""


def dotted(spec: RunSpec) -> dict[str, Any]:
    """Each setting's value under its dotted key."""
    plain = msgspec.to_builtins(spec)
    return {
        key: plain[key] if "." not in key else plain[key.split(".")[0]][key.split(".")[1]]
        for key, section in known_keys(RunSpec).items()
        if section is None
    }


def settings() -> list[str]:
    return list(dotted(RunSpec()))


def refusal(*layers: dict[str, Any]) -> SpecError:
    with pytest.raises(SpecError) as caught:
        resolve(*layers)
    return caught.value


def test_no_layer_at_all_gives_the_defaults() -> None:
    assert resolve() == RunSpec()


def test_the_defaults_are_qloras() -> None:
    spec = RunSpec()
    assert (spec.bits, spec.quant.type, spec.quant.double, spec.lora.r, spec.lora.alpha) == (4, "nf4", True, 64, 16)
    assert (spec.optim.lr, spec.optim.schedule, spec.optim.clip, spec.optim.beta2) == (2e-4, "constant", 0.3, 0.999)


def test_a_later_layer_wins_setting_by_setting() -> None:
    recipe = {"seq_len": 64, "lora": {"r": 16, "alpha": 32}, "optim": {"lr": 1e-3}}
    flags = {"lora": {"r": "8"}, "seed": "3"}
    spec = resolve(recipe, flags)
    assert (spec.seq_len, spec.seed, spec.optim.lr) == (64, 3, 1e-3)
    assert spec.lora == Lora(r=8, alpha=32)
    assert resolve(flags, recipe).lora == Lora(r=16, alpha=32)


def test_layers_are_left_as_they_were() -> None:
    recipe: dict[str, Any] = {"lora": {"r": 16}}
    resolve(recipe, {"lora": {"alpha": 1}})
    assert recipe == {"lora": {"r": 16}}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("micro_bach", "micro_batch"), ("lora.rr", "lora.r"), ("lora.dropuot", "lora.dropout"), ("lr", "optim.lr"),
        ("train.lr", "optim.lr"), ("optim.lora_alpha", "lora.alpha"), ("held_out", "train.held_out"),
        ("learning_rate", "optim.lr"), ("batch_size", "global_batch"), ("per_device_train_batch_size", "micro_batch"),
        ("lora_r", "lora.r"), ("rank", "lora.r"), ("lora_dropout", "lora.dropout"), ("max_grad_norm", "optim.clip"),
        ("max_steps", "steps"), ("num_train_epochs", "epochs"), ("max_seq_length", "seq_len"),
        ("cutoff_len", "seq_len"), ("target_modules", "lora.targets"),
        ("gradient_checkpointing", "train.checkpointing"), ("lr_scheduler_type", "optim.schedule"),
        ("quant_type", "quant.type"), ("double_quant", "quant.double"), ("adam_beta2", "optim.beta2"),
        ("warmup", "optim.warmup_steps"), ("val_set_size", "train.held_out"), ("report_to", "trackers"),
        ("zero_stage", "zero.stage"), ("stage", "zero.stage"), ("offload", "zero.offload"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_or_what_it_is_called_here(key: str, nearest: str) -> None:
    for error in (unknown_key(key), refusal(nested(key, 1))):
        assert (error.message, error.try_) == (f"unknown setting {key!r}", nearest)


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("key", ["use_rslora", "lora.peft_use_rslora", "load_in_4bit", "warmup_ratio"])
def test_what_others_call_a_setting_of_other_values_points_to_ours_and_guesses_none(key: str) -> None:
    leaf = key.rpartition(".")[2]
    for error in (unknown_key(key), unknown_key(key, "true"), refusal(nested(key, 1))):
        assert (error.message, error.try_) == (f"unknown setting {key!r}", f"qdist settings {leaf}")


def test_a_key_like_no_other_points_to_the_list() -> None:
    assert unknown_key("optimizer", "adamw_8bit").ways == ({"optim.name": "adamw-8bit"},)
    assert unknown_key("zzzzzz").try_ == "a setting that `qdist launch --help` lists"


@pytest.mark.parametrize(
    ("layer", "message", "attempt"),
    [
        ({"bits": "5"}, "bits cannot be '5': it is one of 2, 3, 4, 8, 16", "--bits 4"),
        ({"bits": "four"}, "bits cannot be 'four': it is one of 2, 3, 4, 8, 16", "--bits 4"),
        ({"dtype": "bf16"}, "dtype cannot be 'bf16': it is one of bfloat16, float16, float32", "--set dtype=bfloat16"),
        ({"compute": "fp4"}, "compute cannot be 'fp4': it is fp8 or auto", "--set compute=fp8"),
        ({"compute": "int4"}, "compute cannot be 'int4': it is fp8 or auto", "--set compute=auto"),
        ({"quant": {"type": "nf"}}, "quant.type cannot be 'nf': it is one of fp4, nf4", "--set quant.type=nf4"),
        ({"zero": {"stage": 4}}, "zero.stage cannot be 4: it is one of 0, 1, 2, 3", "--set zero.stage=0"),
        ({"zero": {"offload": "nvme"}}, "zero.offload cannot be 'nvme': it is one of cpu, none",
         "--set zero.offload=none"),
        ({"method": "qlorra"}, "method cannot be 'qlorra': it is one of gptq-lora, qa-lora, qlora",
         "--method qlora"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule cannot be 'cosin': it is one of constant, cosine, linear",
         "--set optim.schedule=cosine"),
        ({"trackers": ["tensorbord"]},
         "trackers cannot be ['tensorbord']: it is one of mlflow, tensorboard, trackio, wandb",
         "--set trackers=tensorboard"),
        ({"lora": {"r": 0}}, "lora.r cannot be 0: expected a whole number, 1 or more", "--set lora.r=64"),
        ({"lora": {"r": "0.5"}}, "lora.r cannot be '0.5': expected a whole number", "--set lora.r=64"),
        ({"lora": {"r": None}}, "lora.r cannot be None: expected a whole number", "--set lora.r=64"),
        ({"lora": {"dropout": 1}}, "lora.dropout cannot be 1: expected a number < 1",
         "--set lora.dropout=0.0"),
        ({"lora": {"targets": []}}, "lora.targets cannot be []: expected one or more names",
         "--set lora.targets=all-linear"),
        ({"lora": {"targets": ["q", 3]}}, "lora.targets cannot be ['q', 3]: expected text",
         "--set lora.targets=all-linear"),
        ({"seq_len": 7}, "seq_len cannot be 7: expected a whole number, 8 or more", "--set seq_len=512"),
        ({"steps": True}, "steps cannot be True: expected a whole number", "--set steps=auto"),
        ({"seed": -1}, "seed cannot be -1: expected a whole number, 0 or more", "--set seed=0"),
        ({"split": {"offload_layers": -1}}, "split.offload_layers cannot be -1: expected a whole number, 0 or more",
         "--set split.offload_layers=auto"),
        ({"placement": "offload"}, "placement cannot be 'offload': it is one of replicate, shard, split",
         "--placement split --set split.offload_layers=8"),
        ({"placement": "FSDP"}, "placement cannot be 'FSDP': it is one of replicate, shard, split",
         "--placement shard"),
        ({"placement": "ddp"}, "placement cannot be 'ddp': it is one of replicate, shard, split",
         "--placement replicate"),
        ({"placement": "device-map"}, "placement cannot be 'device-map': it is one of replicate, shard, split",
         "--placement split"),
        ({"optim": {"name": "adamw_8bit"}},
         "optim.name cannot be 'adamw_8bit': it is one of adamw, adamw-8bit, paged-adamw",
         "--set optim.name=adamw-8bit"),
        ({"optim": {"name": "adamw_bnb_8bit"}},
         "optim.name cannot be 'adamw_bnb_8bit': it is one of adamw, adamw-8bit, paged-adamw",
         "--set optim.name=adamw-8bit"),
        ({"optim": {"name": "paged_adamw_32bit"}},
         "optim.name cannot be 'paged_adamw_32bit': it is one of adamw, adamw-8bit, paged-adamw",
         "--set optim.name=paged-adamw"),
        ({"optim": {"name": "adamw_torch_fused"}},
         "optim.name cannot be 'adamw_torch_fused': it is one of adamw, adamw-8bit, paged-adamw",
         "--set optim.name=adamw"),
        ({"seed": 2**63}, f"seed cannot be {2**63}: expected a whole number <= {2**63 - 1}", "--set seed=0"),
        ({"optim": {"lr": float("nan")}}, "optim.lr cannot be nan: expected a number > 0",
         "--set optim.lr=0.0002"),
        ({"optim": {"clip": float("inf")}}, "optim.clip cannot be inf: expected a number <= 1e+300",
         "--set optim.clip=0.3"),
        ({"epochs": float("inf")}, "epochs cannot be inf: expected a number <= 1e+300", "--set epochs=auto"),
        ({"train": {"checkpointing": "maybe"}}, "train.checkpointing cannot be 'maybe': expected true or false",
         "--set train.checkpointing=auto"),
        ({"max_memory": "gpu0=24GiB"}, "max_memory: 'gpu0' is not the number of a GPU", "--max-memory 24GiB"),
        ({"max_memory": "8GiB,9GiB"}, "max_memory=8GiB,9GiB caps every GPU twice", "--max-memory 9GiB"),
        ({"max_memory": "0=8GiB,0=9GiB"}, "max_memory=0=8GiB,0=9GiB caps GPU 0 twice", "--max-memory 9GiB"),
        ({"max_memory": "24GX"}, "'24GX' is not an amount of memory such as 24GiB or 24GB", "--max-memory 24GiB"),
        ({"split": 3}, "'split' is a section, not a setting", "split.schedule, split.offload_layers"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_key_and_the_choices(layer: dict[str, Any], message: str, attempt: str) -> None:
    error = refusal(layer)
    assert (error.message, error.try_) == (message, attempt)


@pytest.mark.parametrize(
    ("layer", "message", "attempt"),
    [
        ({"bits": 8, "quant": {"type": "fp4"}}, "quant.* describes 4-bit backbones; this one has 8 bits",
         "--bits 4"),
        ({"bits": 16, "quant": {"double": False}}, "quant.* describes 4-bit backbones; this one has 16 bits",
         "--bits 4"),
        ({"compute": "fp8", "dtype": "float16"},
         "compute=fp8 gives products in bfloat16, which dtype=float16 does not take", "--set dtype=bfloat16"),
        ({"compute": "fp8", "bits": 8},
         "compute=fp8 is for 4-bit and GPTQ backbones, not for one of 8 bits, which multiplies in int8 already",
         "--bits 4"),
        ({"compute": "fp8", "bits": 16}, "compute=fp8 is for 4-bit and GPTQ backbones, not for one of 16 bits, whose "
         "weights would be rounded anew for every product", "--bits 4"),
        ({"steps": 10, "epochs": 3}, "steps=10 and epochs=3 both say how long to train", "--set epochs=auto"),
        ({"seq_len": 512, "data": {"source_max_len": 16, "target_max_len": 512}},
         "data.source_max_len=16 and data.target_max_len=512 give samples of up to 528 tokens, and seq_len=512 cuts "
         "them before that", "--set seq_len=528"),
        ({"seq_len": 512, "data": {"target_max_len": 600}},
         "data.target_max_len=600 give samples of up to 600 tokens, and seq_len=512 cuts them before that",
         "--set seq_len=600"),
        ({"micro_batch": 5, "global_batch": 16}, "global_batch=16 is not a multiple of micro_batch=5",
         "--set micro_batch=4"),
        ({"zero": {"stage": 3, "offload": "cpu"}}, "zero.offload=cpu comes with ZeRO stage 2, not 3",
         "--set zero.stage=2"),
        ({"zero": {"stage": 0, "offload": "cpu"}}, "zero.offload=cpu comes with ZeRO stage 2, not 0",
         "--set zero.stage=2"),
        ({"optim": {"name": "adamw-8bit"}, "zero": {"stage": 1}},
         "optim.name=adamw-8bit does not go with zero.stage=1: ZeRO cuts the adapter's state into equal shares, and so "
         "cuts through the blocks of 256 numbers that share a scale", "--set zero.stage=auto"),
        ({"optim": {"name": "adamw-8bit"}, "zero": {"offload": "cpu"}},
         "optim.name=adamw-8bit does not go with zero.offload=cpu: ZeRO cuts the adapter's state into equal shares, "
         "and so cuts through the blocks of 256 numbers that share a scale", "--set zero.offload=none"),
        ({"optim": {"reduce_dtype": "bfloat16"}, "zero": {"stage": 2}},
         "optim.reduce_dtype=bfloat16 does not go with zero.stage=2: DeepSpeed adds gradients up by itself, in "
         "float32, and keeps nothing of what a rounding leaves", "--set zero.stage=auto"),
        ({"optim": {"reduce_dtype": "bfloat16"}, "zero": {"offload": "cpu"}},
         "optim.reduce_dtype=bfloat16 does not go with zero.offload=cpu: DeepSpeed adds gradients up by itself, in "
         "float32, and keeps nothing of what a rounding leaves", "--set zero.offload=none"),
        ({"optim": {"warmup_steps": 3}}, "optim.warmup_steps=3 has no effect on a constant schedule",
         "--set optim.schedule=linear"),
        ({"train": {"held_out": 0, "answers": 3}}, "train.eval_steps and train.answers need held-out records",
         "--set train.held_out=0.1"),
        ({"train": {"held_out": 2.5}}, "train.held_out=2.5 is neither a share below 1 nor a whole number of records",
         "--set train.held_out=2"),
        ({"train": {"held_out": 20}, "data": {"eval": "b.jsonl"}},
         "data.eval=b.jsonl is evaluated on, so train.held_out=20 holds out nothing", "--set train.held_out=0.1"),
        ({"data": {"columns": ["output"]}}, "data.columns has 'output', which is not OURS=THEIRS",
         "--set data.columns=instruction=question"),
        ({"train": {"verify_steps": 10}}, "train.verify_steps=10 compares the bytes of a sharded backbone",
         "--set train.verify_steps=0"),
        ({"placement": "split", "train": {"verify_steps": 10}},
         "train.verify_steps=10 compares the bytes of a sharded backbone", "--set train.verify_steps=0"),
        ({"train": {"held_out": 0, "eval_steps": 3}}, "train.eval_steps and train.answers need held-out records",
         "--set train.held_out=0.1"),
        ({"format": "text", "data": {"template": "ziya"}},
         "format=text is text as it stands, which data.template=ziya does not word", "--set data.template=auto"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(layer: dict[str, Any], message: str, attempt: str) -> None:
    error = refusal(layer)
    assert (error.message, error.try_) == (message, attempt)
    key, _, value = attempt.removeprefix("--set ").partition("=")
    if value:
        resolve(layer, nest({key: value}))


@pytest.mark.parametrize(
    "layer",
    [
        {"seq_len": 528, "data": {"source_max_len": 16, "target_max_len": 512}},
        {"bits": 8, "quant": {"type": "nf4", "double": True}},
        {"optim": {"reduce_dtype": "bfloat16"}},
        {"optim": {"reduce_dtype": "bfloat16"}, "zero": {"stage": 0}},
        {"zero": {"offload": "cpu"}},
        {"zero": {"stage": 2, "offload": "cpu"}},
        {"optim": {"warmup_steps": 3, "schedule": "linear"}},
        {"train": {"held_out": 0}},
        {"train": {"held_out": 200, "eval_steps": 5}},
        {"train": {"held_out": 0, "eval_steps": 5}, "data": {"eval": "b.jsonl"}},
        {"data": {"columns": ["output=answer"], "roles": ["user=Q"]}},
        {"train": {"verify_steps": 10}, "placement": "shard"},
        {"micro_batch": 4, "global_batch": 16},
        {"compute": "fp8", "dtype": "bfloat16"},
        {"compute": "fp8", "method": "gptq-lora", "bits": 8},
    ],
)
def test_settings_that_agree_are_accepted(layer: dict[str, Any]) -> None:
    resolve(layer)


def test_the_spec_with_other_values_leaves_nothing_out() -> None:
    default, other = dotted(RunSpec()), dotted(OTHER)
    same = {key for key in default if default[key] == other[key]}
    gptq = {"method", "quant.group_size", "lora.pool", "lora.pool_group_size"}
    assert same == {"bits", "epochs", "train.verify_steps", "train.stuck_seconds", "optim.reduce_dtype", *gptq}


@pytest.mark.parametrize("spec", [RunSpec(), OTHER, RunSpec(epochs=2.5, bits=16, zero=Zero(stage=0))])
def test_a_recipe_reads_back_as_the_spec_it_was_written_from(spec: RunSpec) -> None:
    assert resolve(tomllib.loads(to_toml(spec))) == spec


@pytest.mark.parametrize("key", settings())
def test_every_setting_can_be_assigned(key: str) -> None:
    simple = {"epochs": 1.5, "bits": 8, "data.path": "a.jsonl", "model": "m=1", "train.verify_steps": 7}
    value = simple.get(key, dotted(OTHER)[key])
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    base = {
        "optim.warmup_steps": {"optim": {"schedule": "linear"}},
        "train.verify_steps": {"placement": "shard"},
        "train.patience": {"train": {"eval_steps": 5}},
    }
    spec = resolve(base.get(key, {}), nest(dict([parse_assignment(f"{key}={text}")])))
    assert dotted(spec)[key] == (value.strip() if isinstance(value, str) else value)


@pytest.mark.parametrize("key", settings())
def test_every_setting_can_be_given_its_default_again(key: str) -> None:
    value = dotted(RunSpec())[key]
    text = ",".join(value) if isinstance(value, tuple) else "auto" if value is None else str(value)
    assert resolve(nest(dict([parse_assignment(f"{key}={text}")]))) == RunSpec()


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("lora.r=32", ("lora.r", "32")),
        (" lora.r = 32 ", ("lora.r", "32")),
        ("data=a=b.jsonl", ("data.path", "a=b.jsonl")),
        ("micro_batch=auto", ("micro_batch", None)),
        ("optim.name=None", ("optim.name", None)),
        ("format=auto", ("format", "auto")),
        ("zero.offload=none", ("zero.offload", "none")),
        ("lora.targets=q_proj, v_proj,", ("lora.targets", ["q_proj", "v_proj"])),
        ("trackers=", ("trackers", [])),
        ('lora.targets=["q_proj", "v_proj"]', ("lora.targets", ["q_proj", "v_proj"])),
        ("lora.targets=['q_proj',\n 'v_proj',]", ("lora.targets", ["q_proj", "v_proj"])),
        ('lora.targets="q_proj,v_proj"', ("lora.targets", ["q_proj", "v_proj"])),
        ('new_tokens=["<a,b>"]', ("new_tokens", ["<a,b>"])),
        ("new_tokens=[INST],[/INST]", ("new_tokens", ["[INST]", "[/INST]"])),
        ("trackers=[]", ("trackers", [])),
        ('data="a b.jsonl"', ("data.path", "a b.jsonl")),
        (r'data="a\tb.jsonl"', ("data.path", "a\tb.jsonl")),
        ("data='a\\b.jsonl'", ("data.path", "a\\b.jsonl")),
        ("data=[2024] a.jsonl", ("data.path", "[2024] a.jsonl")),
        ("data=2_024", ("data.path", "2_024")),
        ("global_batch=1_024", ("global_batch", 1024)),
        ("seq_len=0x200", ("seq_len", 512)),
        ("seq_len=1__0", ("seq_len", "1__0")),
        ("train.checkpointing=true", ("train.checkpointing", "true")),
        ('micro_batch="auto"', ("micro_batch", None)),
    ],
)
def test_an_assignment_is_a_key_and_a_value(text: str, pair: tuple[str, object]) -> None:
    assert parse_assignment(text) == pair


@pytest.mark.parametrize("text", ["lora.r", "", "=3", "lora.r:3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is not key=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("text", "message", "attempt"),
    [
        ('lora.targets=["q_proj", "v_proj"',
         """lora.targets cannot be '["q_proj", "v_proj"': it is neither names with commas nor a whole TOML list or """
         "string", "--set lora.targets=q_proj,v_proj"),
        ("lora.targets=[q_proj, v_proj]",
         "lora.targets cannot be '[q_proj, v_proj]': it is neither names with commas nor a whole TOML list or string",
         "--set lora.targets=q_proj,v_proj"),
        ('data="a b.jsonl', """data.path cannot be '"a b.jsonl': it is not a whole TOML string""",
         "--data 'a b.jsonl'"),
        ('data="', """data.path cannot be '"': it is not a whole TOML string""", "another data.path"),
        ('data="a"\nseed=1', """data.path cannot be '"a"\\nseed=1': it is not a whole TOML string""",
         "--data 'a\"\nseed=1'"),
    ],
)  # fmt: skip
def test_a_value_that_is_half_of_toml_is_refused_with_one_that_works(text: str, message: str, attempt: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_assignment(text)
    assert (caught.value.message, caught.value.try_) == (message, attempt)


@pytest.mark.parametrize("targets", ['"q_proj, v_proj"', '["q_proj", "v_proj"]'])
def test_a_recipe_takes_a_list_and_a_text_with_commas(targets: str) -> None:
    recipe = tomllib.loads(f'trackers = "TensorBoard,wandb"\n[lora]\ntargets = {targets}\n')
    spec = resolve(recipe)
    assert spec.lora.targets == ("q_proj", "v_proj")
    assert spec.trackers == ("tensorboard", "wandb")


def test_a_section_is_not_assigned() -> None:
    with pytest.raises(SpecError, match="'zero' is a section, not a setting") as caught:
        nest({"zero": 3})
    assert caught.value.try_ == "zero.stage, zero.offload"


@pytest.mark.parametrize("call", [lambda key: parse_assignment(f"{key}=1"), lambda key: nest({key: 1})])
def test_an_unknown_key_is_refused_wherever_it_enters(call: Any) -> None:
    with pytest.raises(SpecError, match=r"unknown setting 'lora\.rank'"):
        call("lora.rank")


def test_the_memory_cap_is_read_in_its_unit() -> None:
    assert memory_cap_of(RunSpec(), 0) is None
    assert memory_cap_of(RunSpec(max_memory="24GiB"), 3) == 24 * GIB


@pytest.mark.parametrize(
    ("typed", "gib"),
    [("0=20GiB,1=10GiB", (20, 10, None)), ("24 GiB, 1 = 10GiB", (24, 10, 24)), ("2=8GiB", (None, None, 8))],
)
def test_each_gpu_can_have_a_cap_of_its_own(typed: str, gib: tuple[int | None, ...]) -> None:
    spec = resolve(dict([parse_assignment(f"max_memory={typed}")]))
    assert tuple(memory_cap_of(spec, gpu) for gpu in range(3)) == tuple(each and each * GIB for each in gib)


@pytest.mark.parametrize("name", ["placement", "gpus_per_group", "max_memory"])
@pytest.mark.parametrize("word", ["auto", "Auto", "none"])
def test_a_flag_can_leave_a_setting_to_the_plan(name: str, word: str) -> None:
    assert nest({name: word}) == {name: None}
    assert resolve({name: "24GiB"} if name == "max_memory" else {}, nest({name: word})) == RunSpec()


def test_choices_are_known_in_any_case() -> None:
    spec = resolve({"placement": "Shard", "method": "QLoRA", "dtype": "BFloat16", "zero": {"offload": "NONE"}})
    assert (spec.placement, spec.method, spec.dtype, spec.zero.offload) == ("shard", "qlora", "bfloat16", "none")
