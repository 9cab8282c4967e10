"""The sections of a `RunSpec`: adapter, packing of the backbone, optimizer, ZeRO, split and training loop."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST_STEPS = 2**63 - 1
Positive = Annotated[int, Meta(ge=1, le=MOST_STEPS)]
Count = Annotated[int, Meta(ge=0, le=MOST_STEPS)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(gt=0, le=1e300)]
Amount = Annotated[float, Meta(ge=0, le=1e300)]

Placement = Literal["replicate", "shard", "split"]
"""How the GPUs of a group hold the backbone: each all of it, each a part of every layer, each some whole layers."""
Schedule = Literal["1f1b", "sequential"]
"""How a split backbone runs: one rank per stage with micro-batches in flight, or one process visiting GPU after GPU."""
Pool = Literal["peft", "mean", "sum"]
Optimizer = Literal["adamw", "paged-adamw", "adamw-8bit"]
"""Forms of AdamW, which differ in where and how wide the moments are."""
OPTIMIZERS_ELSEWHERE: dict[str, dict[str, object]] = {
    other: {"optim.name": name}
    for name, others in {
        "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_bnb_32bit", "adam"),
        "paged-adamw": ("paged_adamw_32bit", "adamw_paged"),
        "adamw-8bit": ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw8bit", "bnb_adamw_8bit", "adam8bit"),
    }.items()
    for other in others
}
"""What transformers, Axolotl, Unsloth and bitsandbytes call a form of AdamW."""
Compute = Literal["fp8"]
"""Arithmetic of the backbone's products in training, where it is not `dtype`."""
LOSS = "loss"
"""What `train.best` calls the held-out loss."""
OF_MODELS, OF_FILES = ("generate",), ("judge", "elo")
"""Kinds of tasks that are of answers, not of probabilities: those that models give, and those that files hold."""
GPTQ_METHODS = ("gptq-lora", "qa-lora")
"""Methods whose backbone is a GPTQ checkpoint."""


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained and evaluated on, and how its records are read. `data` alone stands for `data.path`."""

    path: Annotated[
        str,
        Meta(
            description="Records: a JSON, JSONL, CSV, TSV, Parquet or Arrow file, a folder, a data set by name, a hub "
            "id, or demo. Several with commas: a.jsonl:0.7,b.parquet:0.3 draws by weight, b.parquet#2000 takes 2,000 "
            "records."
        ),
    ] = ""
    eval: Annotated[
        str | None,
        Meta(description="Records to evaluate on, instead of a share held out of the data."),
    ] = None
    columns: Annotated[
        tuple[str, ...],
        Meta(description="Names of the data's columns for ours, as instruction=question,output=answer."),
    ] = ()
    roles: Annotated[
        tuple[str, ...],
        Meta(description="Names of the data's roles for ours, as user=Customer,assistant=Agent."),
    ] = ()
    template: Annotated[
        str | None,
        Meta(
            description="Chat template, by name or as a Jinja file, in place of the tokenizer's own. Auto: the "
            "tokenizer's; without one, the format's own wording."
        ),
    ] = None
    skip_bad: Annotated[
        Count, Meta(description="Records that cannot be used and may be left out; more are an error.")
    ] = 0
    source_max_len: Annotated[
        Positive | None, Meta(description="Longest prompt, in tokens; longer ones are cut, as in Guanaco's recipes.")
    ] = None
    target_max_len: Annotated[
        Positive | None, Meta(description="Longest answer, in tokens; longer ones are cut, as in Guanaco's recipes.")
    ] = None


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter (Hu et al. 2021): W + alpha / r * B A, or what `variant` puts in place of r."""

    r: Annotated[Positive, Meta(description="Rank of the adapter.")] = 64
    alpha: Annotated[Rate, Meta(description="Scale of the adapter, which adds alpha / r * B A.")] = 16.0
    variant: Annotated[
        Literal["lora", "rslora"],
        Meta(
            description="What alpha is divided by. lora: the rank. rslora: its square root, so that the updates of "
            "large ranks do not shrink (Kalajdzievski 2023)."
        ),
    ] = "lora"
    dropout: Annotated[Fraction, Meta(description="Share of the adapter's inputs dropped in training.")] = 0.0
    targets: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="What gets an adapter: linear modules by leaf name, such as q_proj,v_proj; all-linear: every "
            "one inside the decoder layers; experts, or experts.down_proj: matrices of every routed expert.",
        ),
    ] = ("all-linear",)
    pool: Annotated[
        Pool,
        Meta(
            description="QA-LoRA: what A reads of a group of inputs. peft: their mean times the number of groups; "
            "mean: as the authors' code; sum: as their paper. Each is a plain PEFT adapter."
        ),
    ] = "peft"
    pool_group_size: Annotated[
        Positive | None,
        Meta(
            description="QA-LoRA: inputs pooled into one, a multiple of the checkpoint's group size. Auto: that group "
            "size."
        ),
    ] = None

    def __str__(self) -> str:
        return f"r={self.r} alpha={self.alpha:g}" + (" (rsLoRA)" if self.variant == "rslora" else "")


class Quant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the frozen backbone is packed. Where a setting does not apply to the method, only its default is accepted."""

    type: Annotated[Literal["nf4", "fp4"], Meta(description="QLoRA at 4 bits: the data type.")] = "nf4"
    double: Annotated[bool, Meta(description="QLoRA at 4 bits: quantize the scales of the blocks too.")] = True
    group_size: Annotated[
        Literal[-1, 32, 64, 128],
        Meta(
            description="Random GPTQ weights (load_format=dummy): inputs that share a scale, -1 for all. A checkpoint "
            "has its own."
        ),
    ] = 128


class Optim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW and its learning-rate schedule."""

    name: Annotated[
        Optimizer | None,
        Meta(
            description="Optimizer. adamw-8bit: moments in 8 bits, a scale for each 256 numbers of a matrix; not with "
            "ZeRO 1 to 3. Auto: paged-adamw on GPUs without room for the optimizer state, else adamw."
        ),
    ] = None
    lr: Annotated[Rate, Meta(description="Learning rate, at its peak.")] = 2e-4
    lr_ratio_b: Annotated[
        Rate,
        Meta(description="LoRA+ (Hayou et al. 2024): learning rate of the adapter's B matrices over that of the rest."),
    ] = 1.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Meta(description="Learning rate after the warmup: constant, or decaying to 0."),
    ] = "constant"
    warmup_steps: Annotated[
        Count, Meta(description="Steps in which the learning rate rises from 0; not with schedule=constant.")
    ] = 0
    beta1: Annotated[Fraction, Meta(description="Decay per step of AdamW's first moment.")] = 0.9
    beta2: Annotated[Fraction, Meta(description="Decay per step of AdamW's second moment.")] = 0.999
    eps: Annotated[Rate, Meta(description="AdamW's epsilon, added to the denominator.")] = 1e-8
    weight_decay: Annotated[Amount, Meta(description="Decoupled weight decay of the adapter.")] = 0.0
    clip: Annotated[Amount, Meta(description="Largest global gradient norm; 0 switches clipping off.")] = 0.3
    reduce_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Meta(
            description="How the adapter's gradients cross between ranks. bfloat16: half the bytes, for slow networks; "
            "what a step's rounding leaves is added to the next step's gradients. Not with ZeRO 1 to 3."
        ),
    ] = "float32"


class Zero(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What DeepSpeed partitions of the adapter state (Rajbhandari et al. 2020)."""

    stage: Annotated[
        Literal[0, 1, 2, 3] | None,
        Meta(description="ZeRO stage of the adapter's gradients and optimizer state, over ranks or groups."),
    ] = None
    offload: Annotated[
        Literal["none", "cpu"], Meta(description="Where the optimizer state is held; cpu needs ZeRO stage 2.")
    ] = "none"


class Split(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a backbone is trained of which each GPU holds some whole layers."""

    schedule: Annotated[
        Schedule | None,
        Meta(
            description="1f1b: one rank per pipeline stage, several micro-batches in flight. sequential: one process "
            "that visits one GPU after another."
        ),
    ] = None
    offload_layers: Annotated[
        Count | None,
        Meta(description="Layers whose packed weights are offloaded to host memory. Auto: as many as do not fit."),
    ] = None


class Train(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training loop: its loss, evaluations, checkpoints and checks."""

    checkpointing: Annotated[
        bool | None,
        Meta(
            description="Recompute activations in the backward pass instead of storing them. Auto: in as many layers "
            "as necessary."
        ),
    ] = None
    held_out: Annotated[
        Amount, Meta(description="Records held out for evaluation: a share below 1, or a number of them.")
    ] = 0.1
    eval_steps: Annotated[
        Count, Meta(description="Steps between evaluations; 0: only before the first step and after the last.")
    ] = 0
    tasks: Annotated[
        tuple[str, ...],
        Meta(description="Tasks of `qdist evaluate` that every evaluation measures too, such as mmlu:FILE."),
    ] = ()
    best: Annotated[
        str | None,
        Meta(description="Figure by which the best checkpoint is chosen: loss, or one of train.tasks. Auto: loss."),
    ] = None
    patience: Annotated[
        Count, Meta(description="Evaluations without a better figure after which the run ends; 0: never.")
    ] = 0
    save_steps: Annotated[Positive, Meta(description="Steps between checkpoints.")] = 50
    keep: Annotated[Positive, Meta(description="Checkpoints kept beside the best one.")] = 2
    verify_steps: Annotated[
        Count,
        Meta(
            description="Placement shard: steps between byte-for-byte checks of the gathered backbone; 0: only at the "
            "start."
        ),
    ] = 0
    stuck_seconds: Annotated[
        Count,
        Meta(
            description="Seconds without a heartbeat, or without progress, after which a rank ends the run; the "
            "stacks of all ranks are then in RUN/stacks. 0: never."
        ),
    ] = 600
    train_on_source: Annotated[bool, Meta(description="Take the loss on the user's turns too.")] = False
    answers: Annotated[
        Count, Meta(description="Held-out questions answered before and after training, shown at the end.")
    ] = 0
