"""What the user wants: one frozen `RunSpec`, from flags over a recipe over defaults, and back to a recipe."""

import re
from collections.abc import Mapping
from functools import reduce
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qdist.core.errors import Change, SpecError
from qdist.core.spec.contradictions import contradiction
from qdist.core.spec.keys import choices, is_list, json_text, known_keys, names_of, optional, read_value
from qdist.core.spec.sections import (
    MOST_STEPS,
    Compute,
    Count,
    Data,
    Lora,
    Optim,
    Placement,
    Positive,
    Quant,
    Rate,
    Split,
    Train,
    Zero,
)
from qdist.core.spec.suggest import not_among, of_another_kind, or_tried_hint, unknown
from qdist.core.text import parse_bytes

USUAL_BATCH = 16
"""Samples per optimizer step, unless told."""
SHORT = {"data": "data.path"}
"""Sections that may be given as one value, and the setting that it is."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning job as the user wants it."""

    model: Annotated[str, Meta(description="Model: an alias, a folder, a GGUF file or a hub id.")] = ""
    method: Annotated[
        Literal["qlora", "gptq-lora", "qa-lora"],
        Meta(
            description="qlora: the backbone is packed by bitsandbytes. gptq-lora: a GPTQ checkpoint as it is. "
            "qa-lora: the same, with an adapter that merges into it without loss."
        ),
    ] = "qlora"
    bits: Annotated[
        Literal[2, 3, 4, 8, 16],
        Meta(description="Bits of a backbone weight: 4, 8 or 16; a GPTQ checkpoint has its own."),
    ] = 4
    trust_remote_code: Annotated[
        bool,
        Meta(
            description="Run the Python files of the model's own repository on this machine, with all your rights, "
            "where transformers has no class for the model."
        ),
    ] = False
    format: Annotated[
        Literal[
            "auto",
            "alpaca",
            "input-output",
            "oasst",
            "sharegpt",
            "messages",
            "self-instruct",
            "preference",
            "transcript",
            "text",
        ],
        Meta(description="Format of the records. Auto: detected."),
    ] = "auto"
    adapter: Annotated[
        str | None,
        Meta(
            description="Adapter to start from: a run, or a folder that PEFT wrote, of this model, rank, alpha and "
            "targets. Auto: a new one."
        ),
    ] = None
    run: Annotated[str | None, Meta(description="Run directory. Auto: runs/MODEL-METHOD-DATA.")] = None
    gpus: Annotated[
        Positive | None,
        Meta(description="Number of GPUs; of CPU processes where there is no GPU. Auto: all GPUs, or one process."),
    ] = None
    placement: Annotated[
        Placement | None,
        Meta(
            description="What each GPU of a group holds of the backbone: all of it, a part of every layer, or some "
            "whole layers. Auto: the fastest that fits."
        ),
    ] = None
    gpus_per_group: Annotated[
        Positive | None,
        Meta(description="GPUs that hold one backbone between them; groups work on different samples."),
    ] = None
    max_memory: Annotated[
        str | None,
        Meta(
            description="Cap on each GPU, such as 24GiB, or by GPU, such as 0=20GiB,1=10GiB; enforced in the ranks. "
            "Auto: no cap."
        ),
    ] = None
    load_format: Annotated[
        Literal["auto", "dummy"], Meta(description="dummy: random weights and random tokens, nothing to download.")
    ] = "auto"
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Meta(
            description="Arithmetic of the backbone; the adapter is always float32. Auto: bfloat16 on GPUs that have "
            "it, float16 on older ones, float32 on CPUs."
        ),
    ] = None
    compute: Annotated[
        Compute | None,
        Meta(
            description="fp8: in training, a 4-bit or GPTQ backbone's linears multiply in e4m3, with a scale for each "
            "token and each row of weights, on GPUs that can. Adapter, attention, norms, head, experts and evaluations "
            "stay in bfloat16. Auto: everything in dtype."
        ),
    ] = None
    seq_len: Annotated[
        int, Meta(ge=8, le=MOST_STEPS, description="Longest sample, in tokens; longer ones are cut.")
    ] = 512
    micro_batch: Annotated[
        Positive | None,
        Meta(description="Samples at a time on one rank; packed, the samples of seq_len that a row has room for."),
    ] = None
    global_batch: Annotated[
        Positive | None,
        Meta(
            description="Samples per optimizer step, over all ranks. Auto: 16, or on several nodes as many as bring "
            "what the network takes of a step to 5 %; a run keeps its number."
        ),
    ] = USUAL_BATCH
    pack: Annotated[
        bool | None,
        Meta(
            description="Several samples in one row, none of which sees another. Auto: on GPUs, where samples are much "
            "shorter than the longest and the model's attention can keep them apart."
        ),
    ] = None
    graphs: Annotated[
        bool | None,
        Meta(
            description="Capture the passes of a micro-batch as CUDA graphs and replay them, so that no GPU waits for "
            "Python. Auto: on GPUs, where everything in them can be captured."
        ),
    ] = None
    steps: Annotated[Positive | None, Meta(description="Optimizer steps, instead of epochs. Auto: one epoch.")] = None
    epochs: Annotated[Rate | None, Meta(description="Passes over the data, instead of steps. Auto: one.")] = None
    seed: Annotated[Count, Meta(description="Seed of every random number.")] = 0
    liger: Annotated[
        bool | None,
        Meta(description="Liger's fused kernels. Auto: used on GPUs where liger-kernel is installed."),
    ] = None
    new_tokens: Annotated[
        tuple[str, ...],
        Meta(
            description="Special tokens to add to the vocabulary; their rows start at the mean and are saved with the "
            "adapter."
        ),
    ] = ()
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
        Meta(description="Trackers that receive the figures of every step as well."),
    ] = ()
    data: Data = Data()
    lora: Lora = Lora()
    quant: Quant = Quant()
    optim: Optim = Optim()
    zero: Zero = Zero()
    split: Split = Split()
    train: Train = Train()

    @property
    def batch(self) -> int:
        """Samples per optimizer step; of a spec that leaves them to the planner what is usual. A plan's is decided."""
        return self.global_batch or USUAL_BATCH


def memory_caps(spec: RunSpec) -> dict[int | None, int]:
    """The caps in bytes, by GPU; under None that of every GPU which has none of its own.

    Raises SpecError for what is not an amount of memory or no number of a GPU.
    """
    caps: dict[int | None, int] = {}
    for entry in () if spec.max_memory is None else spec.max_memory.split(","):
        gpu, separator, amount = entry.rpartition("=")
        number = gpu.strip()
        if separator and not re.fullmatch(r"[0-9]{1,6}", number):
            raise SpecError(f"max_memory: {number!r} is not the number of a GPU", ways=[{"max_memory": amount.strip()}])
        key = int(number) if separator else None
        if key in caps:
            where = "every GPU" if key is None else f"GPU {key}"
            raise SpecError(f"max_memory={spec.max_memory} caps {where} twice", ways=[{"max_memory": amount.strip()}])
        caps[key] = parse_bytes(amount, "max_memory")
    return caps


def memory_cap_of(spec: RunSpec, gpu: int) -> int | None:
    """The cap on a GPU in bytes, or None."""
    caps = memory_caps(spec)
    return caps.get(gpu, caps.get(None))


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
    """Every setting by dotted key: as given in nested settings, otherwise its default."""
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
        key = whole_key(key, value)
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


def whole_key(key: str, value: Any = "") -> str:
    """The setting that a key is short for, unless its value is a whole section; any other key as it is."""
    return key if isinstance(value, Mapping) else SHORT.get(key, key)


def parse_assignment(text: str) -> tuple[str, Any]:
    """'lora.r=32' -> ('lora.r', '32'). The value is read as `read_value` has it.

    Raises SpecError for what is not an assignment, and for an unknown key.
    """
    key, separator, value = text.partition("=")
    key, value = whole_key(key.strip()), value.strip()
    if not separator or not key:
        raise SpecError(f"{text!r} is not key=value", try_="--set lora.r=32")
    if key not in known_keys(RunSpec):
        raise unknown_key(key, value)
    return key, _or_open(key, value if known_keys(RunSpec)[key] else read_value(RunSpec, key, value))


def _or_open(key: str, value: Any) -> Any:
    """The value, or None if it leaves the setting to the plan."""
    return None if isinstance(value, str) and value.lower() in ("none", "auto") and optional(RunSpec, key) else value


def unknown_key(key: str, value: Any = None) -> SpecError:
    """The error for a setting that does not exist, naming the nearest that does."""
    return unknown(key, [name for name, section in known_keys(RunSpec).items() if section is None], value)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    keys = known_keys(RunSpec)
    merged = dict(base)
    for name, value in over.items():
        key = prefix + name
        if key in SHORT and not isinstance(value, Mapping):
            value = {SHORT[key].rpartition(".")[2]: value}
        if key not in keys:
            raise unknown_key(key)
        if keys[key] is None:
            merged[name] = _in_our_case(key, names_of(value) if is_list(RunSpec, key) else value)
        elif isinstance(value, Mapping):
            merged[name] = _merge(merged.get(name, {}), value, f"{key}.")
        else:
            raise SpecError(f"{key!r} is a section, not a setting", try_=_settings_of(key))
    return merged


def _in_our_case(key: str, value: Any) -> Any:
    """A choice in its proper case, if it was written in another."""
    if isinstance(value, list):
        return [_in_our_case(key, each) for each in value]
    return value.lower() if isinstance(value, str) and value.lower() in choices(RunSpec, key) else value


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
    """The spec, unless its settings contradict each other: then raises SpecError, so that none is ever ignored."""
    memory_caps(spec)
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
    """The spec with a change to its settings. Raises SpecError like `checked`, with untried hints."""
    return settled(msgspec.to_builtins(spec), change) if change else spec
