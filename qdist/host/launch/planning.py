"""Turns a request, by flags or keywords, into a plan for this or another machine, or into a run ready to start."""

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from qdist.core.data.demo import NAME as DEMO
from qdist.core.errors import MACHINE, QUESTIONS, Change, QdistError, SpecError, flag_of, flags
from qdist.core.machine.cards import described
from qdist.core.machine.cluster import Cluster
from qdist.core.machine.nodes import DescribedNode, alike, described_nodes, network_of, number_of_nodes
from qdist.core.planning.advice import needs
from qdist.core.planning.answering import USUAL_CONTEXT, AnsweringPlan, Questions, answers_in_words, plan_answers
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import plan_once
from qdist.core.planning.unsupported import require_supported
from qdist.core.spec.keys import known_keys
from qdist.core.spec.lookup import typed_settings
from qdist.core.spec.run_spec import RunSpec, given, merge, nest, resolve, settled
from qdist.core.spec.suggest import or_tried_hint
from qdist.core.text import parse_bytes, resuming
from qdist.host import templates
from qdist.host.launch import prepare
from qdist.host.launch.claim import tidy
from qdist.host.launch.refusals import await_ranks, refuse_running
from qdist.host.launch.trackers import send_rest
from qdist.host.machine import probe
from qdist.host.machine.recurrence import fla_problem
from qdist.host.run import calibration
from qdist.host.run.rundir import RunDir
from qdist.host.sources.adapters import require_fit
from qdist.host.sources.model_folder import gptq_of
from qdist.host.sources.models import EMBEDDED, Shape, known_shape

Here = Callable[[], Cluster]
FactsOf = Callable[[str, bool], Shape]
_OF_ANSWERS = (
    "model", "trust_remote_code", "bits", "method", "gpus", "max_memory", "dtype", "liger", "lora.r", "lora.targets",
    "lora.pool_group_size", "quant.type", "quant.double", "quant.group_size",
)  # fmt: skip
"""Settings that say how a model answers."""


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan, and for which machine."""

    recipe: str | None = None
    settings: Mapping[str, Any] = {}
    """Settings by flag name or dotted key."""
    assignments: tuple[str, ...] = ()
    """Further settings, as `--set` takes them."""
    gpu_memory: str | None = None
    gpu_name: str | None = None
    host_memory: str | None = None
    nodes: str | int | None = None
    """Number of nodes of that machine, or a TOML file with a table for each; None for one machine."""
    network: str | None = None
    """The network between nodes: '25Gbit', or '25Gbit,0.1ms'."""

    @property
    def described(self) -> bool:
        """Whether the plan is for a machine other than this one."""
        return self.gpu_memory is not None or self.gpu_name is not None

    def nested(self) -> dict[str, Any]:
        """The settings merged over the recipe. Raises SpecError for unknown settings."""
        own = nest(typed_settings(self.settings, self.assignments))
        return merge(*([templates.read_recipe(self.recipe)] if self.recipe is not None else []), own)


Asked = TypeVar("Asked", bound=PlanRequest)
Made = TypeVar("Made")
_Made = TypeVar("_Made", covariant=True)
_Asked = TypeVar("_Asked", contravariant=True)


class Once(Protocol[_Asked, _Made]):
    """Makes what is asked for of a spec; suggestions of a refusal are untried."""

    def __call__(self, request: _Asked, spec: RunSpec, here: Here, facts_of: FactsOf, /) -> _Made: ...


class AnsweringRequest(PlanRequest, frozen=True, kw_only=True):
    """What is to be answered, by which model, and on which machine."""

    batch: int = 1
    context: int | None = None
    """Tokens of a prompt and its answer; None for 2,048, or as many as the model has positions."""
    adapters: int = 1


def planned(request: PlanRequest, here: Here | None = None) -> Plan:
    """The requested plan. Raises QdistError with a suggested change to the command.

    here: finds out what this machine is.
    """
    return _planned(request, cache(here or probe.cluster), _plan_once, needs)


def require_training(questions: Mapping[str, Any]) -> None:
    """Raise SpecError for flags of inference, by their names, if they are typed where a run is planned."""
    typed = [name for name, value in questions.items() if value is not None]
    if typed:
        raise SpecError(
            f"{flag_of(typed[0])} is of plans for inference, and this one is for training",
            try_=f"--for inference {flag_of(typed[0])} {questions[typed[0]]}",
        )


def planned_answers(request: AnsweringRequest, here: Here | None = None) -> AnsweringPlan:
    """How a model would answer, as asked. Raises QdistError with a suggested change to the command.

    here: finds out what this machine is.
    """
    typed = typed_settings(request.settings, request.assignments)
    if needless := [key for key in typed if key not in _OF_ANSWERS]:
        raise SpecError(
            f"{needless[0]} is a setting of training, and the plan is --for inference",
            try_=f"leave it out; settings of inference are {', '.join(_OF_ANSWERS)}",
        )
    return _planned(request, cache(here or probe.cluster), _answers_once, answers_in_words)


def _planned(request: Asked, here: Here, once: Once[Asked, Made], remark: Callable[[Made], str]) -> Made:
    """What was requested; where it is refused, with the smallest change that works."""
    try:
        merged = request.nested()
    except SpecError as error:
        raise _with_further_hint(error, request, here) if error.ways else error from None
    facts_of = cache(known_shape)
    beside = {key: getattr(request, key) for key in (*MACHINE, *QUESTIONS) if hasattr(request, key)}

    def attempt(change: Change) -> Made:
        own = msgspec.structs.replace(request, **{key: change[key] for key in beside if key in change})
        spec = settled(merged, {key: value for key, value in change.items() if key not in beside})
        return once(own, spec, here, facts_of)

    def say(change: Change) -> str:
        elsewhere = "gpu_memory" in change and not request.described
        return flags(change) + (", for GPUs that are not here" if elsewhere else "")

    return or_tried_hint(attempt, {**given(merged), **beside}, say=say, remark=remark)


def _with_further_hint(error: SpecError, request: PlanRequest, here: Here) -> SpecError:
    """The error for an unknown setting, with a hint that also names other errors in the request."""
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


def _model_of(spec: RunSpec, facts_of: FactsOf) -> Shape:
    if not spec.model:
        models = ("llama-65b", "llama-7b", EMBEDDED)
        raise SpecError("no model was named", ways=[{"model": model} for model in models])
    return facts_of(spec.model, spec.trust_remote_code)


def _has_liger(request: PlanRequest, spec: RunSpec) -> bool:
    """Whether liger-kernel is installed: on another machine that is for the user to say."""
    return find_spec("liger_kernel") is not None or (spec.liger is True and request.described)


def _answers_once(request: AnsweringRequest, spec: RunSpec, here: Here, facts_of: FactsOf) -> AnsweringPlan:
    for flag, value in (("--nodes", request.nodes), ("--network", request.network)):
        if value is not None:
            raise SpecError(f"{flag} is of plans for training: a model answers on one machine", try_="leave it out")
    config, facts, _, _ = _model_of(spec, facts_of)
    require_supported(spec, facts, config)
    cluster, context = machine_of(request, spec.gpus, here), request.context
    context = min(USUAL_CONTEXT, facts.max_positions) if context is None else context
    return plan_answers(
        spec, facts, cluster, Questions(request.batch, context, request.adapters), config=config,
        gptq=gptq_of(spec, config), has_liger=_has_liger(request, spec), no_fla=fla_problem(cluster),
    )  # fmt: skip


def _plan_once(request: PlanRequest, spec: RunSpec, here: Here, facts_of: FactsOf) -> Plan:
    # Epochs cannot be counted without the data, and steps have no weight.
    spec = spec if spec.steps else msgspec.structs.replace(spec, steps=1, epochs=None)
    config, facts, _, code = _model_of(spec, facts_of)
    cluster = machine_of(request, spec.gpus, here)
    learnt = None
    if not request.described:
        learnt = calibration.correction_for(cluster, world_size=spec.gpus, bits=spec.bits, compute=spec.compute)
    source = Source(kind="dummy", path="", config=config, tokenizer="", gptq=gptq_of(spec, config), own_code=code)
    plan = plan_once(
        spec, source, facts, cluster, None, has_liger=_has_liger(request, spec), no_fla=fla_problem(cluster),
        correction=learnt,
    )  # fmt: skip
    require_fit(plan)
    return plan


def machine_of(request: PlanRequest, gpus: int | None, here: Here) -> Cluster:
    """The machine or the nodes that the request describes, or this machine.

    gpus: of each node, where the request has them described.
    Raises SpecError for what cannot be a machine, a file of nodes or a network.
    """
    network = None if request.network is None else network_of(request.network)
    if request.nodes is None:
        if network:
            raise SpecError("--network is between nodes, and the plan is for one machine", ways=[{"nodes": 2}])
        return _one_machine(request, gpus, here)
    count = number_of_nodes(str(request.nodes))
    if count is not None:
        return alike(_one_machine(request, gpus, here), count, gpus, network)

    def described_as(node: DescribedNode) -> Cluster:
        own = {key: value for key in ("gpu_name", "gpu_memory", "host_memory") if (value := getattr(node, key))}
        if node.gpu_name:  # whose memory is its own
            own = {"gpu_memory": None, **own}
        return _one_machine(msgspec.structs.replace(request, **own), node.gpus or gpus, here)

    return described_nodes(_tables(str(request.nodes)), str(request.nodes), described_as, network)


def _tables(file: str) -> dict[str, Any]:
    """What a TOML file holds. Raises SpecError for what cannot be read."""
    try:
        with Path(file).open("rb") as opened:
            return tomllib.load(opened)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(
            f"--nodes {file} is neither a number nor a readable TOML file: {why}", ways=[{"nodes": 2}]
        ) from None


def _one_machine(request: PlanRequest, gpus: int | None, here: Here) -> Cluster:
    """The described machine, or this one; with the host memory overridden if it was given."""
    host_bytes = None if request.host_memory is None else parse_bytes(request.host_memory, "host_memory")
    if not request.described:
        return msgspec.structs.replace(here(), memory_bytes=host_bytes) if host_bytes else here()
    return described(gpus=gpus, gpu_name=request.gpu_name, gpu_memory=request.gpu_memory, host_memory_bytes=host_bytes)


def job_of(
    recipe: str | None,
    given: Mapping[str, Any],
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None],
) -> prepare.Launch | prepare.Preview | RunDir:
    """A run from nested settings over a recipe, or the rest of one; with `dry_run`, only a preview of it.

    say: called with a line for the user. Gives the run itself where it is to be resumed and is finished.
    Raises SpecError, ModelError, DataError or PlanError for what the user can put right, RunError for a run that
    cannot be resumed.
    """
    if resume:
        run, changes = changes_of(recipe, given)
        return _rest_of(run, changes, dry_run=dry_run, say=say)
    recipe, settings = settings_of(recipe, given)
    spec = resolve(settings)
    job = prepare.preview(spec) if dry_run else prepare.prepare(spec)
    if recipe:
        say(f"recipe   {recipe}" + (" (chosen because of --data demo)" if recipe == DEMO else ""))
    return job


def settings_of(recipe: str | None, given: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The recipe of a new run, if it has one, and its nested settings with the recipe's. Raises SpecError."""
    recipe = recipe or (DEMO if (given.get("data") or {}).get("path") == DEMO else None)
    return recipe, merge(*([templates.read_recipe(recipe)] if recipe else []), given)


def changes_of(recipe: str | None, given: Mapping[str, Any]) -> tuple[RunDir, dict[str, Any]]:
    """The run that is to be resumed, and the changes to its settings. Raises SpecError if none is named."""
    if recipe or not given.get("run"):
        raise SpecError(
            "--resume goes with --run DIR alone: the run knows its recipe",
            try_="qdist launch --resume --run runs/NAME",
        )
    return RunDir(Path(given["run"])), {key: value for key, value in given.items() if key != "run"}


def _rest_of(
    run: RunDir, changes: Mapping[str, Any], *, dry_run: bool, say: Callable[[str], None]
) -> prepare.Launch | prepare.Preview | RunDir:
    result = run.result()
    if result is not None and not changes:
        tidy(run)
        send_rest(run, say=say)
        why = f"; it {early}" if (early := result.get("ended_early")) else ""
        say(f"{run.path} is finished: {result.get('steps', 'all')} steps, adapter in {run.adapter}{why}")
        if why:
            say(f"  to go on all the same: {resuming(run.path, '--set', 'train.patience=0')}")
        return run
    await_ranks(run, say=say)
    refuse_running(run)
    job = prepare.preview_resume(run, changes) if dry_run else prepare.prepare_resume(run, changes)
    steps = run.checkpoint_steps()
    say(f"resuming {run.path} " + (f"from step {steps[-1]}" if steps else "from the start: it has no checkpoint"))
    return job
