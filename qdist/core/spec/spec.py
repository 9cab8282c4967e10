"""What the user wants: one frozen `RunSpec`, from flags over a recipe over defaults, and back to a recipe."""

from collections.abc import Mapping
from functools import reduce
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qdist.core.errors import Change, SpecError
from qdist.core.spec.contradictions import contradiction
from qdist.core.spec.suggest import not_among, of_another_kind, or_tried_hint, unknown
from qdist.core.text import parse_bytes

Kind = type[msgspec.Struct]


def known_keys(kind: Kind, prefix: str = "") -> dict[str, Kind | None]:
    """Every dotted key; a section maps to its type, a setting to None."""
    keys: dict[str, Kind | None] = {}
    for field in msgspec.structs.fields(kind):
        section = field.type if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) else None
        keys[prefix + field.name] = section
        if section is not None:
            keys.update(known_keys(section, f"{prefix}{field.name}."))
    return keys


def choices(kind: Kind, key: str) -> list[str]:
    """The words that a setting is one of; empty where it takes other values."""
    inner = [each.item_type if isinstance(each, msgspec.inspect.VarTupleType) else each for each in _kinds(kind, key)]
    return [str(value) for each in inner if isinstance(each, msgspec.inspect.LiteralType) for value in each.values]


def optional(kind: Kind, key: str) -> bool:
    """Whether the plan decides where the setting is absent."""
    return any(isinstance(each, msgspec.inspect.NoneType) for each in _kinds(kind, key))


def _kinds(kind: Kind, key: str) -> tuple[msgspec.inspect.Type, ...]:
    """The types that a setting may have."""
    found: type = kind
    for part in key.split("."):
        found = {field.name: field.type for field in msgspec.structs.fields(found)}[part]
    info = msgspec.inspect.type_info(found)
    return info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)


MOST_STEPS = 2**63 - 1
Positive = Annotated[int, Meta(ge=1, le=MOST_STEPS)]
Count = Annotated[int, Meta(ge=0, le=MOST_STEPS)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(gt=0, le=1e300)]
Amount = Annotated[float, Meta(ge=0, le=1e300)]

Pool = Literal["peft", "mean", "sum"]
GPTQ_METHODS = ("gptq-lora", "qa-lora")
"""Methods whose backbone is a GPTQ checkpoint."""


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter (Hu et al. 2021): W + alpha / r * B A."""

    r: Positive = 64
    alpha: Rate = 16.0
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], Meta(min_length=1)] = ("all-linear",)
    """Leaf names of the linear modules that get an adapter; `all-linear` is every one inside the decoder layers."""
    pool: Pool = "peft"
    """Of QA-LoRA: what A reads of a group of inputs. peft: their mean times the number of groups. mean: as the authors'
    code. sum: as their paper."""
    pool_group_size: Positive | None = None
    """Of QA-LoRA: inputs that are pooled; by default the GPTQ group."""


class Quant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a backbone is packed. Where a setting says nothing of the method, only its default is accepted."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Of QLoRA's 4 bits."""
    double: bool = True
    """Of QLoRA's 4 bits: the scales are quantized too."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Of random GPTQ weights: inputs that share a scale. A checkpoint has its own."""


class Optim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW and its schedule."""

    name: Literal["adamw", "paged-adamw"] | None = None
    lr: Rate = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Rate = 1e-8
    weight_decay: Amount = 0.0
    clip: Amount = 0.3
    """Largest global gradient norm; 0 leaves gradients as they are."""


class Zero(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What DeepSpeed partitions of the adapter state (Rajbhandari et al. 2020)."""

    stage: Literal[0, 1, 2, 3] | None = None
    offload: Literal["none", "cpu"] = "none"


class Split(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a backbone of which each GPU holds some whole layers is trained."""

    schedule: Literal["1f1b", "sequential"] | None = None
    """1f1b: a rank a stage, micro-batches in flight. sequential: one process that visits GPU after GPU."""
    offload_layers: Count | None = None
    """Layers whose packed weights wait in host memory; by default as many as do not fit, the last resort."""


class Train(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the loop does between two steps, and on what it takes its loss."""

    checkpointing: bool | None = None
    """Recompute activations in the backward pass instead of storing them."""
    held_out: Fraction = 0.1
    eval_steps: Count = 0
    """Evaluate every so many steps; 0: only before the first and after the last."""
    save_steps: Positive = 50
    keep: Positive = 2
    """Checkpoints kept beside the best one."""
    verify_steps: Count = 0
    """Gather a sharded backbone and compare its bytes again every so many steps; at the start it is always done."""
    stuck_seconds: Count = 600
    """A rank that gives no sign of life for so long, or does not get on with its micro-batch, ends the run with its
    stacks; 0 waits for ever."""
    train_on_source: bool = False
    answers: Count = 0
    """Held-out questions answered before and after, at the end of the run."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning job as the user wants it."""

    model: str = ""
    method: Literal["qlora", "gptq-lora", "qa-lora"] = "qlora"
    """qlora: packed here by bitsandbytes. gptq-lora: a GPTQ checkpoint as it is. qa-lora: the same, with an adapter
    that folds into it without loss."""
    bits: Literal[2, 3, 4, 8, 16] = 4
    data: str = ""
    format: Literal["auto", "alpaca", "input-output", "oasst", "sharegpt", "messages", "self-instruct", "text"] = "auto"
    run: str | None = None
    gpus: Positive | None = None
    """Ranks. On a machine without GPUs they are CPU processes."""
    placement: Literal["replicate", "shard", "split"] | None = None
    """How the GPUs of a group hold the backbone: each all of it, each a part of every layer, each some whole layers."""
    gpus_per_group: Positive | None = None
    """GPUs that hold one backbone between them; groups work on different samples."""
    max_memory: str | None = None
    """Cap on each GPU, enforced in the ranks."""
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Arithmetic of the backbone; the adapter is always float32."""
    seq_len: Annotated[int, Meta(ge=8, le=MOST_STEPS)] = 512
    micro_batch: Positive | None = None
    global_batch: Positive = 16
    steps: Positive | None = None
    epochs: Rate | None = None
    seed: Count = 0
    liger: bool | None = None
    new_tokens: tuple[str, ...] = ()
    """Special tokens to add to the vocabulary; their rows start at the mean and are saved with the adapter."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    lora: Lora = Lora()
    quant: Quant = Quant()
    optim: Optim = Optim()
    zero: Zero = Zero()
    split: Split = Split()
    train: Train = Train()


def max_memory_bytes(spec: RunSpec) -> int | None:
    """The cap on each GPU in bytes, or None."""
    return None if spec.max_memory is None else parse_bytes(spec.max_memory, "max_memory")


def resolve(*layers: Mapping[str, Any]) -> RunSpec:
    """The spec that layers of nested settings give; a later layer wins over an earlier one.

    Raises SpecError naming the key, what is wrong with its value, and a change with which all the settings agree.
    """
    merged = merge(*layers)
    return or_tried_hint(lambda change: settled(merged, change), given(merged))


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of nested settings as one. Raises SpecError for an unknown key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer, "")
    return merged


def settled(merged: Mapping[str, Any], change: Change) -> RunSpec:
    """The spec of nested settings with a change to them. Raises SpecError, as `resolve` does, with untried hints."""
    changed = _merge(merged, nest(change), "")
    try:
        spec = msgspec.convert(changed, RunSpec, strict=False)
    except msgspec.ValidationError as error:
        raise _value_error(str(error), changed) from None
    return checked(spec)


def given(merged: Mapping[str, Any]) -> dict[str, Any]:
    """What nested settings set, by dotted key, and the default of every other setting."""
    return {**flatten(RunSpec()), **_flat(merged, "")}


def _flat(nested: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = prefix + name
        flat |= _flat(value, f"{key}.") if known_keys(RunSpec).get(key) and isinstance(value, Mapping) else {key: value}
    return flat


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{'lora.r': 8} -> {'lora': {'r': 8}}. Raises SpecError for an unknown key."""
    nested: dict[str, Any] = {}
    keys = known_keys(RunSpec)
    for key, value in dotted.items():
        if key not in keys:
            raise unknown_key(key)
        if keys[key] is not None:
            raise SpecError(f"{key!r} is a section, not a setting", try_=_settings_of(key))
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = _or_open(key, value)
    return nested


def parse_assignment(text: str) -> tuple[str, Any]:
    """'lora.r=32' -> ('lora.r', '32'). A value with commas becomes a tuple where the setting is a list."""
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator or not key:
        raise SpecError(f"{text!r} is not key=value", try_="--set lora.r=32")
    if key not in known_keys(RunSpec):
        raise unknown_key(key, value)
    if key in ("lora.targets", "trackers", "new_tokens"):
        return key, [part.strip() for part in value.split(",") if part.strip()]
    return key, _or_open(key, value)


def _or_open(key: str, value: Any) -> Any:
    """None where the value leaves a setting to the plan."""
    return None if isinstance(value, str) and value.lower() in ("none", "auto") and optional(RunSpec, key) else value


def unknown_key(key: str, value: Any = None) -> SpecError:
    """The error for a setting that does not exist, naming the nearest that does."""
    return unknown(key, [name for name, section in known_keys(RunSpec).items() if section is None], value)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    keys = known_keys(RunSpec)
    merged = dict(base)
    for name, value in over.items():
        key = prefix + name
        if key not in keys:
            raise unknown_key(key)
        if keys[key] is None:
            merged[name] = value.lower() if isinstance(value, str) and value.lower() in choices(RunSpec, key) else value
        elif isinstance(value, Mapping):
            merged[name] = _merge(merged.get(name, {}), value, f"{key}.")
        else:
            raise SpecError(f"{key!r} is a section, not a setting", try_=_settings_of(key))
    return merged


def _settings_of(section: str) -> str:
    return ", ".join(key for key in known_keys(RunSpec) if key.startswith(f"{section}."))


def _value_error(message: str, merged: Mapping[str, Any]) -> SpecError:
    """msgspec's 'Expected ... - at `$.lora.r`' with the value that was given and the nearest choice."""
    reason, _, where = message.partition(" - at `$.")
    key = where.rstrip("`").partition("[")[0]
    value: Any = merged
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else value
    usual = flatten(RunSpec()).get(key)
    if among := choices(RunSpec, key):
        return not_among(key, value, among, "" if usual is None else json_text(usual))
    settable = usual not in ("", ()) and (usual is not None or optional(RunSpec, key))
    return of_another_kind(key, value, reason, {key: usual} if settable else {})


def checked(spec: RunSpec) -> RunSpec:
    """The spec. Raises SpecError for settings that contradict each other, so that none is ever ignored."""
    max_memory_bytes(spec)
    if error := contradiction(flatten(spec), flatten(RunSpec())):
        raise error
    return spec


def flatten(spec: RunSpec) -> dict[str, Any]:
    """Every setting by its dotted key."""
    plain = msgspec.to_builtins(spec)
    return {
        key: reduce(lambda place, part: place[part], key.split("."), plain)
        for key, section in known_keys(RunSpec).items()
        if section is None
    }


def changed(spec: RunSpec, change: Change) -> RunSpec:
    """The spec with a change to its settings. Raises SpecError, as `checked` does, with untried hints."""
    return settled(msgspec.to_builtins(spec), change) if change else spec


def json_text(value: Any) -> str:
    """A setting as one types it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return msgspec.json.encode(value).decode().strip('"')


def to_toml(spec: RunSpec) -> str:
    """The spec as a recipe that `qdist launch` reads back; what the plan decides is left out."""
    plain = msgspec.to_builtins(spec)
    lines = [
        f"{key} = {_toml_value(value)}"
        for key, value in plain.items()
        if not isinstance(value, dict) and value is not None
    ]
    for section, settings in plain.items():
        if isinstance(settings, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    """TOML's strings, numbers, booleans and arrays of strings are JSON's, but for DEL, which TOML wants escaped."""
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
