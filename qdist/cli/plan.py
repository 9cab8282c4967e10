"""`qdist plan`: what launch would do, or how a model would answer, on any machine, without torch and the weights."""

import os
from typing import Any

import click
import msgspec

from qdist.cli.flags import SettingsCommand, setting_flags
from qdist.cli.views.answering import answering_lines
from qdist.cli.views.plan import plan_lines, shown
from qdist.core.errors import QUESTIONS, SpecError
from qdist.core.planning.device_map import device_map
from qdist.core.spec.lookup import COMMON
from qdist.core.text import format_bytes
from qdist.host.launch.planning import (
    AnsweringRequest,
    PlanRequest,
    machine_of,
    planned,
    planned_answers,
    require_training,
)
from qdist.host.machine import probe
from qdist.host.nodes.place import stale_here
from qdist.host.sources.models import known_shape
from qdist.host.terminal import say, say_json

_SETTINGS = ("model", "trust_remote_code", "bits", "method", "gpus", "placement", "gpus_per_group", "max_memory")
"""Settings with a flag of their own, besides the common ones."""


@click.command(cls=SettingsCommand)
@click.argument("recipe", required=False)
@click.option(
    "--for", "purpose", type=click.Choice(["training", "inference"]), default="training", show_default=True,
    help="What is planned: a run, or answers to several prompts at a time.",
)  # fmt: skip
@setting_flags(*_SETTINGS, *COMMON)
@click.option("--batch", type=int, metavar="N", help="Inference: answers at a time.  [default: 1]")
@click.option("--context", type=int, metavar="N", help="Inference: tokens of a prompt and its answer.  [default: 2048]")
@click.option(
    "--adapters", type=int, metavar="N", help="Inference: adapters that are loaded; 0 for the base.  [default: 1]"
)
@click.option("--gpu-memory", help="Memory of each: 48GiB, or '2 x 24GiB + 48GiB'; by default that of the card.")
@click.option("--gpu-name", help="The card where it is not this machine's: 'RTX 4090', or 'RTX 3090 + RTX 4090'.")
@click.option("--host-memory", help="Host memory of the machine; where it is not this one, 64GiB or twice its GPUs'.")
@click.option("--nodes", metavar="N|FILE", help="Nodes of that machine, or a TOML file with a [[node]] table for each.")
@click.option("--network", metavar="TEXT", help="The network between nodes: 25Gbit, or 25Gbit,0.1ms.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE",
    help="Any setting of `qdist settings`, such as lora.alpha=32.",
)  # fmt: skip
@click.option("--json", "form", flag_value="json", help="The whole plan as JSON.")
@click.option("--device-map", "form", flag_value="device-map", help="As JSON where transformers is to put each module.")
def plan(form: str | None, purpose: str, **asked: Any) -> None:
    """Show how a run, or a model that answers, would lie in memory and how fast it would be.

    Exits with 2 if it does not fit.
    """
    request = requested(purpose=purpose, **asked)
    if isinstance(request, AnsweringRequest):
        _show_answers(form, request)
        return
    decided = planned(request)
    if form:
        shape = decided if form == "json" else device_map(decided)
        say_json(msgspec.json.format(msgspec.json.encode(shape), indent=2))
        return
    plain = decided.device == "cuda" and not decided.liger and decided.spec.liger is None
    notes = _notes_on_model(decided.spec.model, trusted=decided.spec.trust_remote_code)
    notes += [_NO_LIGER] if plain else []
    notes += _notes_on_host(request, decided.spec.gpus) if decided.offloaded_layers else []
    notes += [] if request.described else list(filter(None, [stale_here(os.environ)]))
    lines = plan_lines(decided, notes=tuple(notes))
    say(shown([line for line in lines if not line.startswith("steps")]))


_NO_LIGER = "liger-kernel is not installed here: --set liger=true plans with its kernels"


def _show_answers(form: str | None, request: AnsweringRequest) -> None:
    """Print how a model would answer."""
    if form == "device-map":
        raise SpecError("--device-map is of plans for training", try_="--json, whose residence has each layer's GPU")
    decided = planned_answers(request)
    if form:
        say_json(msgspec.json.format(msgspec.json.encode(decided), indent=2))
        return
    notes = _notes_on_model(decided.spec.model, trusted=decided.spec.trust_remote_code)
    notes += [_NO_LIGER] if decided.device == "cuda" and not decided.liger and decided.spec.liger is None else []
    notes += _notes_on_host(request, decided.spec.gpus) if decided.residence.offloaded else []
    say(shown(answering_lines(decided, notes=tuple(notes))))


def _notes_on_model(model: str, *, trusted: bool) -> list[str]:
    """Where a model's configuration is from, if not from the model itself."""
    note = known_shape(model, trusted).note
    return [note] if note else []


def _notes_on_host(request: PlanRequest, gpus: int | None) -> list[str]:
    """How much host memory a described machine is taken to have."""
    if not request.described or request.host_memory is not None:
        return []
    host = machine_of(request, gpus, probe.cluster).memory_bytes
    return [f"the machine is taken to have {format_bytes(host)} of host memory: --host-memory"]


def requested(*, purpose: str = "training", **asked: Any) -> PlanRequest:
    """The request made by the flags of `qdist plan`: an AnsweringRequest for inference."""
    typed = {name: asked.pop(name, None) for name in QUESTIONS}
    own = {name: asked.pop(name) for name in msgspec.structs.asdict(PlanRequest()) if name in asked}
    if purpose == "inference":
        questions = {name: value for name, value in typed.items() if value is not None}
        return AnsweringRequest(settings=asked, **own, **questions)
    require_training(typed)
    return PlanRequest(settings=asked, **own)
