"""`qdist plan`: what launch would do, for this machine or another, without torch and without the weights."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import click
import msgspec

from qdist.cli.flags import COMMON, SettingsCommand, setting_flags, typed_settings
from qdist.cli.views.plan import plan_lines, shown
from qdist.core.errors import MACHINE, Change, QdistError, SpecError, flags
from qdist.core.machine.cluster import Cluster
from qdist.core.machine.described import described
from qdist.core.planning.advice import needs
from qdist.core.planning.device_map import device_map
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import plan_once
from qdist.core.spec.keys import known_keys
from qdist.core.spec.spec import RunSpec, given, merge, nest, settled
from qdist.core.spec.suggest import or_tried_hint
from qdist.core.text import format_bytes, parse_bytes
from qdist.host import templates
from qdist.host.machine import probe
from qdist.host.run import calibration
from qdist.host.sources.model_folder import gptq_of
from qdist.host.sources.models import EMBEDDED, Shape, known_shape
from qdist.host.terminal import say, say_json

Here = Callable[[], Cluster]
FactsOf = Callable[[str], Shape]
_SETTINGS = ("model", "bits", "method", "gpus", "placement", "gpus_per_group", "max_memory")
"""Settings that have a flag of their own, beside the common ones."""


@click.command(cls=SettingsCommand)
@click.argument("recipe", required=False)
@setting_flags(*_SETTINGS, *COMMON)
@click.option("--gpu-memory", help="Memory of each: 48GiB, or '2 x 24GiB + 48GiB'; by default that of the card.")
@click.option("--gpu-name", help="The card where it is not this machine's: 'RTX 4090', or 'RTX 3090 + RTX 4090'.")
@click.option("--host-memory", help="Host memory of the machine; where it is not this one, 64GiB or twice its GPUs'.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE",
    help="Any setting of `qdist settings`, such as lora.alpha=32.",
)  # fmt: skip
@click.option("--json", "form", flag_value="json", help="The whole plan as JSON.")
@click.option("--device-map", "form", flag_value="device-map", help="As JSON where transformers is to put each module.")
def plan(form: str | None, **asked: Any) -> None:
    """Show how a run would lie in memory and how fast it would go; exit 2 when it does not fit."""
    request = Request(**asked)
    decided = planned(request)
    if form:
        shape = decided if form == "json" else device_map(decided)
        say_json(msgspec.json.format(msgspec.json.encode(shape), indent=2))
        return
    plain = decided.device == "cuda" and not decided.liger and decided.spec.liger is None
    of_another = known_shape(decided.spec.model).note
    notes = [of_another] if of_another else []
    notes += ["liger-kernel is not installed here: --set liger=true plans with its kernels"] if plain else []
    if request.described and request.host_memory is None and decided.offloaded_layers:
        host = _machine(request, decided.spec.gpus, probe.cluster).memory_bytes
        notes.append(f"the machine is taken to have {format_bytes(host)} of host memory: --host-memory")
    lines = plan_lines(decided, notes=tuple(notes))
    say(shown([line for line in lines if not line.startswith("steps")]))


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was typed behind `qdist plan`."""

    recipe: str | None = None
    assignments: tuple[str, ...] = ()
    gpu_memory: str | None = None
    gpu_name: str | None = None
    host_memory: str | None = None
    model: str | None = None
    bits: str | None = None
    method: str | None = None
    gpus: int | None = None
    placement: str | None = None
    gpus_per_group: str | None = None
    max_memory: str | None = None
    steps: str | None = None
    epochs: str | None = None
    lr: str | None = None
    batch_size: str | None = None
    seq_len: str | None = None
    lora_r: str | None = None
    seed: str | None = None

    @property
    def described(self) -> bool:
        """Whether the plan is for another machine than this one."""
        return self.gpu_memory is not None or self.gpu_name is not None

    def settings(self) -> dict[str, Any]:
        """Flags over recipe, nested. Raises SpecError for what is no setting."""
        flags = {name: getattr(self, name) for name in (*_SETTINGS, *COMMON)}
        own = nest(typed_settings(flags, self.assignments))
        return merge(*([templates.read_recipe(self.recipe)] if self.recipe is not None else []), own)


def planned(request: Request, here: Here | None = None) -> Plan:
    """The plan that was asked for. Raises QdistError with a change to the command that was tried.

    here: finds out what this machine is.
    """
    here = cache(here or probe.cluster)
    try:
        merged = request.settings()
    except SpecError as error:
        raise _with_further_hint(error, request, here) if error.ways else error from None
    facts_of = cache(known_shape)

    def attempt(change: Change) -> Plan:
        own = msgspec.structs.replace(request, **{key: change[key] for key in MACHINE if key in change})
        spec = settled(merged, {key: value for key, value in change.items() if key not in MACHINE})
        return _plan_once(own, spec, here, facts_of)

    def say(change: Change) -> str:
        elsewhere = "gpu_memory" in change and not request.described
        return flags(change) + (", for GPUs that are not here" if elsewhere else "")

    machine = {key: getattr(request, key) for key in MACHINE}
    return or_tried_hint(attempt, {**given(merged), **machine}, say=say, remark=needs)


def _with_further_hint(error: SpecError, request: Request, here: Here) -> SpecError:
    """The error for a setting that does not exist; its hint says as well what is wrong beside it."""
    known = known_keys(RunSpec)
    mistyped = next(each for each in request.assignments if each.partition("=")[0].strip() not in known)
    (meant,) = (f"{key}={value}" for key, value in error.ways[0].items())
    mended = (*(each for each in request.assignments if each != mistyped), meant)
    try:
        planned(msgspec.structs.replace(request, assignments=mended), here)
    except QdistError as further:
        if further.try_.startswith("--"):
            changed_again = meant.partition("=")[0] + "=" in further.try_
            error.try_ = further.try_ if changed_again else f"{error.try_} {further.try_}"
        error.message += f", {further.message}" * further.message.startswith("unknown setting")
    return error


def _plan_once(request: Request, spec: RunSpec, here: Here, facts_of: FactsOf) -> Plan:
    if not spec.model:
        models = ("llama-65b", "llama-7b", EMBEDDED)
        raise SpecError("no model was named", ways=[{"model": model} for model in models])
    # Epochs cannot be counted without the data, and steps have no weight.
    spec = spec if spec.steps else msgspec.structs.replace(spec, steps=1, epochs=None)
    config, facts, _ = facts_of(spec.model)
    cluster = _machine(request, spec.gpus, here)
    # What another machine has installed is for the user to say.
    has_liger = find_spec("liger_kernel") is not None or (spec.liger is True and request.described)
    learnt = None
    if not request.described:
        learnt = calibration.correction_for(cluster, world_size=spec.gpus, bits=spec.bits)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=gptq_of(spec, config))
    return plan_once(spec, source, facts, cluster, None, has_liger=has_liger, correction=learnt)


def _machine(request: Request, gpus: int | None, here: Here) -> Cluster:
    """The machine that was described, or this one; with other host memory if that was named."""
    host_bytes = None if request.host_memory is None else parse_bytes(request.host_memory, "host_memory")
    if not request.described:
        return msgspec.structs.replace(here(), memory_bytes=host_bytes) if host_bytes else here()
    return described(gpus=gpus, gpu_name=request.gpu_name, gpu_memory=request.gpu_memory, host_memory_bytes=host_bytes)
