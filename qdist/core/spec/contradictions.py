"""Which settings contradict each other, whatever the model and machine, and how is that resolved?"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qdist.core.data.reading import reading_of
from qdist.core.errors import Change, SpecError
from qdist.core.spec.placements import verified
from qdist.core.spec.sections import LOSS, OF_FILES, OF_MODELS, Data

Flat = Mapping[str, Any]
"""Every setting by its dotted key."""

_MOST_SAMPLES = 8192
"""Most samples in a suggested micro-batch."""
_WIDTHS = {"qlora": (4, 8, 16), "gptq-lora": (2, 3, 4, 8), "qa-lora": (2, 3, 4, 8)}


def contradiction(now: Flat, usual: Flat) -> SpecError | None:
    """The first contradiction found, or None. usual: the default of every setting."""
    return next((error for rule in _RULES for error in rule(now, usual)), None)


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of a batch of `number` samples that is at most `at_most`."""
    return next(n for n in range(min(number, at_most, _MOST_SAMPLES), 0, -1) if number % n == 0)


def _width(now: Flat, _: Flat) -> Iterator[SpecError]:
    method, bits = now["method"], now["bits"]
    *others, last = _WIDTHS[method]
    if bits not in _WIDTHS[method]:
        narrower: Change = {"bits": 4}
        yield SpecError(
            f"{method} has backbones of {', '.join(map(str, others))} or {last} bits, not {bits}",
            ways=[{"method": "gptq-lora"}, narrower] if method == "qlora" else [narrower, {"method": "qlora"}],
        )


def _arithmetic(now: Flat, _: Flat) -> Iterator[SpecError]:
    if now["compute"] is None:
        return
    asked, as_dtype = f"compute={now['compute']}", {"compute": None}
    if now["dtype"] not in (None, "bfloat16"):
        yield SpecError(
            f"{asked} gives products in bfloat16, which dtype={now['dtype']} does not take",
            ways=[{"dtype": "bfloat16"}, as_dtype],
        )
    if now["method"] == "qlora" and now["bits"] != 4:
        why = {8: "which multiplies in int8 already", 16: "whose weights would be rounded anew for every product"}
        yield SpecError(
            f"{asked} is for 4-bit and GPTQ backbones, not for one of {now['bits']} bits, {why[now['bits']]}",
            ways=[{"bits": 4}, as_dtype],
        )


def _packing(now: Flat, usual: Flat) -> Iterator[SpecError]:
    gptq, nf4, groups = now["method"] != "qlora", ("quant.type", "quant.double"), ("quant.group_size",)
    if gptq and (plain := _as_usual(nf4, now, usual)):
        yield SpecError("quant.type and quant.double describe NF4 and FP4, not GPTQ", ways=[plain])
    if not gptq and (plain := _as_usual(groups, now, usual)):
        yield SpecError(
            f"quant.group_size={now['quant.group_size']} describes GPTQ weights, and qlora packs none",
            ways=[{"method": "gptq-lora"}, plain],
        )
    if not gptq and now["bits"] != 4 and (plain := _as_usual(nf4, now, usual)):
        yield SpecError(
            f"quant.* describes 4-bit backbones; this one has {now['bits']} bits", ways=[{"bits": 4}, plain]
        )


def _pooling(now: Flat, usual: Flat) -> Iterator[SpecError]:
    plain = _as_usual(("lora.pool", "lora.pool_group_size"), now, usual)
    if now["method"] != "qa-lora" and plain:
        yield SpecError("lora.pool and lora.pool_group_size describe QA-LoRA", ways=[{"method": "qa-lora"}, plain])


def _length(now: Flat, _: Flat) -> Iterator[SpecError]:
    if now["steps"] is not None and now["epochs"] is not None:
        yield SpecError(
            f"steps={now['steps']} and epochs={now['epochs']:g} both say how long to train",
            ways=[{"epochs": None}, {"steps": None}],
        )


def _lengths(now: Flat, _: Flat) -> Iterator[SpecError]:
    """Prompts and answers that, each of its greatest length, would be cut once more as a whole."""
    parts = {key: now[key] for key in ("data.source_max_len", "data.target_max_len") if now[key] is not None}
    if (most := sum(parts.values())) > now["seq_len"]:
        named = " and ".join(f"{key}={value}" for key, value in parts.items())
        yield SpecError(
            f"{named} give samples of up to {most} tokens, and seq_len={now['seq_len']} cuts them before that",
            ways=[{"seq_len": most}, dict.fromkeys(parts)],
        )


def _batch(now: Flat, _: Flat) -> Iterator[SpecError]:
    batch, size = now["global_batch"], now["micro_batch"]
    if size is not None and batch is not None and batch % size and not now["pack"]:
        yield SpecError(
            f"global_batch={batch} is not a multiple of micro_batch={size}",
            ways=[{"micro_batch": largest_divisor(batch, size)}, {"global_batch": -(-batch // size) * size}],
        )


def _state(now: Flat, _: Flat) -> Iterator[SpecError]:
    if now["zero.offload"] == "cpu" and now["zero.stage"] not in (None, 2):
        yield SpecError(
            f"zero.offload=cpu comes with ZeRO stage 2, not {now['zero.stage']}",
            ways=[{"zero.stage": 2}, {"zero.offload": "none"}],
        )


def _moments(now: Flat, usual: Flat) -> Iterator[SpecError]:
    if now["optim.name"] != "adamw-8bit" or not (now["zero.stage"] or now["zero.offload"] == "cpu"):
        return
    what = f"zero.stage={now['zero.stage']}" if now["zero.stage"] else "zero.offload=cpu"
    yield SpecError(
        f"optim.name=adamw-8bit does not go with {what}: ZeRO cuts the adapter's state into equal shares, and so cuts "
        "through the blocks of 256 numbers that share a scale",
        ways=[{"zero.stage": None, "zero.offload": usual["zero.offload"]}, {"optim.name": None}],
    )


def _reduction(now: Flat, usual: Flat) -> Iterator[SpecError]:
    if now["optim.reduce_dtype"] == "float32" or not (now["zero.stage"] or now["zero.offload"] == "cpu"):
        return
    what = f"zero.stage={now['zero.stage']}" if now["zero.stage"] else "zero.offload=cpu"
    yield SpecError(
        f"optim.reduce_dtype={now['optim.reduce_dtype']} does not go with {what}: DeepSpeed adds gradients up by "
        "itself, in float32, and keeps nothing of what a rounding leaves",
        ways=[
            {"zero.stage": None, "zero.offload": usual["zero.offload"]},
            {"optim.reduce_dtype": usual["optim.reduce_dtype"]},
        ],
    )


def _warmup(now: Flat, _: Flat) -> Iterator[SpecError]:
    if now["optim.warmup_steps"] and now["optim.schedule"] == "constant":
        yield SpecError(
            f"optim.warmup_steps={now['optim.warmup_steps']} has no effect on a constant schedule",
            ways=[{"optim.schedule": "linear"}],
        )


def _held_out(now: Flat, usual: Flat) -> Iterator[SpecError]:
    held_out, usually = now["train.held_out"], {"train.held_out": usual["train.held_out"]}
    if held_out >= 1 and held_out != int(held_out):
        yield SpecError(
            f"train.held_out={held_out:g} is neither a share below 1 nor a whole number of records",
            ways=[{"train.held_out": int(held_out)}, usually],
        )
    if now["data.eval"] is not None and held_out not in (0, usual["train.held_out"]):
        yield SpecError(
            f"data.eval={now['data.eval']} is evaluated on, so train.held_out={held_out:g} holds out nothing",
            ways=[usually, {"data.eval": None}],
        )
    if held_out or now["data.eval"]:
        return
    if now["train.answers"] or (now["train.eval_steps"] and not now["train.tasks"]):
        yield SpecError("train.eval_steps and train.answers need held-out records", ways=[usually])
    if now["train.patience"] and not now["train.tasks"]:
        yield SpecError("train.patience needs held-out records, or train.tasks", ways=[usually, {"train.patience": 0}])
    if now["train.best"] == LOSS:
        yield SpecError("train.best=loss needs held-out records", ways=[usually, {"train.best": None}])


def _names(now: Flat, _: Flat) -> Iterator[SpecError]:
    """Columns and roles that are not named as OURS=THEIRS."""
    data = Data(columns=tuple(now["data.columns"]), roles=tuple(now["data.roles"]))
    try:
        reading_of(data, now["format"])
    except SpecError as error:
        yield error


def _template(now: Flat, _: Flat) -> Iterator[SpecError]:
    named, without = now["data.template"], {"data.template": None}
    if named is None:
        return
    if now["format"] in ("oasst", "text"):
        yield SpecError(
            f"format={now['format']} is text as it stands, which data.template={named} does not word",
            ways=[without, {"format": "auto"}],
        )


def _tasks(now: Flat, _: Flat) -> Iterator[SpecError]:
    tasks, best = now["train.tasks"], now["train.best"]
    for task in tasks:
        if task.partition(":")[0] in (*OF_MODELS, *OF_FILES):
            yield SpecError(
                f"train.tasks has {task}, which is of answers: while a run trains, only probabilities are measured",
                try_=f"`qdist evaluate RUN --tasks {task}` once it is trained",
            )
        if task == LOSS:
            yield SpecError("train.tasks has loss, which every evaluation measures", try_=f"{LOSS}:FILE, or without it")
    if best not in (None, LOSS, *tasks):
        yield SpecError(
            f"train.best={best} is not measured: it is {LOSS} or one of train.tasks",
            ways=[{"train.best": None}, {"train.tasks": (*tasks, best)}],
        )


def _patience(now: Flat, usual: Flat) -> Iterator[SpecError]:
    if now["train.patience"] and not now["train.eval_steps"]:
        yield SpecError(
            f"train.patience={now['train.patience']} counts evaluations, and without train.eval_steps there is none "
            "between the first step and the last",
            ways=[{"train.eval_steps": now["train.save_steps"]}, {"train.patience": 0}],
        )


def _as_usual(keys: tuple[str, ...], now: Flat, usual: Flat) -> Change:
    """Changes to the defaults of settings that have another value; empty if none has."""
    return {key: usual[key] for key in keys if now[key] != usual[key]}


_RULES: tuple[Callable[[Flat, Flat], Iterator[SpecError]], ...] = (
    _width, _arithmetic, _packing, _pooling, _length, _lengths, _batch, _state, _moments, _reduction, _warmup, verified,
    _held_out, _names, _template, _tasks, _patience,
)  # fmt: skip
