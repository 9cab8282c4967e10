"""Opens runs over one base, or a model, to answer many questions at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from qdist.core.errors import PlanError, SpecError
from qdist.core.planning.answering import Questions, answering_footprint
from qdist.core.planning.inference import Residence
from qdist.core.sampling import Sampling
from qdist.host.run.rundir import RunDir
from qdist.host.sources.models import locate
from qdist.runtime.data.wording import usual_wording
from qdist.runtime.infer.answerer import Answerer
from qdist.runtime.infer.beside import add_run, require_one_base
from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.decoder import Decoder, why_not
from qdist.runtime.infer.decoding import ends_of
from qdist.runtime.infer.line import Line
from qdist.runtime.infer.linears import AdapterChoice, prepare_linears
from qdist.runtime.infer.load import (
    answering_plan,
    load_run,
    load_tokenizer,
    open_model,
    parts_of,
    require_dtype,
)
from qdist.runtime.infer.one_by_one import OneByOne
from qdist.runtime.infer.plain import has_room
from qdist.runtime.infer.prompts import Speech, speech_of
from qdist.runtime.infer.residence import choose, free_bytes
from qdist.runtime.infer.scheduler import AdapterRows, Batched
from qdist.runtime.infer.text import Script
from qdist.runtime.model.skeleton import DTYPES
from qdist.runtime.quantize.materialize import materialize

ENGINES = ("auto", "qdist", "llama.cpp")


class Ready(NamedTuple):
    """A model that answers."""

    answerer: Answerer
    speeches: Mapping[str, Speech]
    """How to prompt each adapter, by its name, and the base under the empty name."""
    where: str
    """Where the model is and how it answers, as a line for people."""


class _Loaded(NamedTuple):
    model: Any
    speeches: Mapping[str, Speech]
    known: Mapping[str, str]
    """PEFT's names by the adapters' names; empty for a model without adapters."""
    where: str
    slots: int


def open_answerer(
    targets: Mapping[str, str],
    *,
    slots: int,
    tokens: int,
    engine: str = "auto",
    dtype: str = "auto",
    max_memory_bytes: int | None = None,
    graphs: bool | None = None,
    ahead: Sequence[Sampling] = (Sampling(),),
) -> Ready:
    """An answerer with the adapters of runs over one base, which answers without an adapter too; or over a plain model.

    targets: runs by the names that their adapters get; or one model, by any name or the empty one.
    slots: answers that are worked on at a time; fewer where layers of a run would be offloaded for them.
    tokens: of a prompt and its answer together, at most; the model may have fewer positions. Memory is left for
    slots x tokens.
    engine: of `ENGINES`. graphs: see `Decoder`. ahead: what is compiled and captured before the first question.
    dtype: what is computed in; auto, bfloat16, float16 or float32, as for `qdist.load`.

    Raises RunError for runs without adapters and over different bases, SpecError for settings that contradict each
    other or the machine, PlanError where the model does not fit.
    """
    if engine not in ENGINES:
        raise SpecError(f"there is no engine called {engine!r}", try_=", ".join(ENGINES))
    require_dtype(dtype)
    if engine == "llama.cpp":
        if max_memory_bytes is not None or graphs:
            raise SpecError("max_memory and graphs are of GPUs, and llama.cpp computes on CPUs", try_="engine='qdist'")
        if dtype != "auto":
            raise SpecError(f"llama.cpp computes in a dtype of its own, not in {dtype}", try_="dtype='auto'")
        from qdist.runtime.infer.llama_cpp import open_llama_cpp

        return open_llama_cpp(targets, slots=slots, tokens=tokens)
    is_model = not _runs(targets)
    speeches = {name: speech_of(target) for name, target in targets.items()}
    positions = min(tokens, *(own.positions or tokens for own in speeches.values()))
    load = _load_plain if is_model else _load_runs
    loaded = load(targets, speeches, dtype, slots=slots, positions=positions, max_memory_bytes=max_memory_bytes)
    answerer, how = _answerer(loaded, slots=loaded.slots, positions=positions, graphs=graphs, ahead=ahead)
    at_a_time = f"{loaded.slots} answers at a time" if loaded.slots > 1 else "an answer at a time"
    if loaded.slots < slots:
        at_a_time += f", since there is no memory for {slots}"
    where = f"{loaded.where}; {at_a_time}, of up to {positions:,} tokens with their prompts"
    return Ready(answerer, loaded.speeches, _joined(where, how))


def _runs(targets: Mapping[str, str]) -> dict[str, RunDir]:
    """The targets as runs; none if they are one model."""
    runs = {name: RunDir(target) for name, target in targets.items() if RunDir(target).exists()}
    if not targets:
        raise SpecError("there is nothing to answer with", try_="a run or a model")
    if "" in runs:
        raise SpecError(f"the adapter of {targets['']} has no name", try_="a name: without one the base is asked")
    if len(targets) > 1 and (others := [target for name, target in targets.items() if name not in runs]):
        raise SpecError(
            f"{others[0]} is not a run, and several targets must be runs over one base",
            try_="runs alone: their base answers too",
        )
    return runs


def _load_runs(
    targets: Mapping[str, str],
    speeches: Mapping[str, Speech],
    wanted: str,
    *,
    slots: int,
    positions: int,
    max_memory_bytes: int | None,
) -> _Loaded:
    runs = _runs(targets)
    plans = [answering_plan(run, needs_tokenizer=True) for run in runs.values()]
    require_one_base(tuple(runs.values()), plans)
    dtype = DTYPES[plans[0].compute_dtype if wanted == "auto" else wanted]
    parts = parts_of(plans[0], dtype, rank_r=sum(plan.spec.lora.r for plan in plans))

    def place(count: int) -> Residence:
        asked = Questions(count, positions, len(runs))
        return choose(answering_footprint(parts, asked), device=None, max_memory_bytes=max_memory_bytes)

    slots, residence = slots_with_room(slots, place)
    (first, *others), known = runs.values(), dict(zip(runs, _peft_names(len(runs)), strict=True))
    model, _ = load_run(first, dtype, residence)
    for run, name in zip(others, tuple(known.values())[1:], strict=True):
        add_run(model, run, name)
    tokenizer = load_tokenizer(plans[0].source)
    base = Speech(tokenizer, usual_wording(tokenizer), plans[0].facts.max_positions)
    return _Loaded(model, {"": base, **speeches}, known, str(residence), slots)


def slots_with_room(slots: int, place: Callable[[int], Residence]) -> tuple[int, Residence]:
    """(answers at a time, where the model then is): halved until no layer is offloaded for their keys and values.

    place: says where the model is with so many. A layer that visits its GPU for each token takes more time than
    half of the answers. Where even one answer needs layers offloaded, there are as many as were asked for.
    """
    for count in _halves(slots):
        with suppress(PlanError) if count > 1 else nullcontext():
            if not (found := place(count)).offloaded:
                return count, found
    return slots, place(slots)


def _halves(slots: int) -> Iterator[int]:
    """Numbers of answers at a time to try, down to one."""
    while slots:
        yield slots
        slots //= 2


def _peft_names(count: int) -> list[str]:
    """PEFT's own names of adapters: those that people give may hold dots, which modules' names must not."""
    return ["default", *(f"adapter_{number}" for number in range(2, count + 1))]


def _load_plain(
    targets: Mapping[str, str],
    speeches: Mapping[str, Speech],
    dtype: str,
    *,
    slots: int,
    positions: int,
    max_memory_bytes: int | None,
) -> _Loaded:
    ((name, target),) = targets.items()
    slots = slots_beside(target, slots, positions, dtype, max_memory_bytes)
    opened = open_model(
        target, dtype=dtype, tokens=slots * positions, max_memory_bytes=max_memory_bytes, needs_tokenizer=True
    )
    return _Loaded(opened.model, {"": speeches[name], **speeches}, {}, opened.where, slots)


def slots_beside(target: str, slots: int, positions: int, dtype: str, max_memory_bytes: int | None) -> int:
    """Answers at a time that a GPU has room for beside a whole model; as many as were asked for if there is none."""
    if not torch.cuda.is_available():
        return slots
    folder, rooms = materialize(locate(target)), free_bytes()

    def fit(count: int) -> bool:
        return any(has_room(folder, dtype, count * positions, free, max_memory_bytes) for free in rooms)

    return next(filter(fit, _halves(slots)), slots)


def _answerer(
    loaded: _Loaded, *, slots: int, positions: int, graphs: bool | None, ahead: Sequence[Sampling]
) -> tuple[Answerer, str]:
    """What answers with a model, and what is to be said of that."""
    model = loaded.model
    base = model.get_base_model() if loaded.known else model
    scripts, vocabulary = {name: _script(base, own) for name, own in loaded.speeches.items()}, _vocabulary(base)
    line, chooser = Line(scripts, positions, vocabulary), Chooser(slots, vocabulary, base.device)
    reason = why_not(model, positions=positions)
    choice = None if _is_dispatched(base) else prepare_linears(model)
    select = partial(_select, choice, {"": "", **loaded.known})
    if reason and graphs:
        raise SpecError(f"steps cannot be captured: {reason}", try_="graphs=None")
    if reason:
        answerer = OneByOne(base, chooser, line, slots=slots, select=select)
        return answerer, _joined(f"each token by a pass of its own: {reason}", choice.note if choice else "")
    numbers = {**dict.fromkeys(loaded.speeches, 0), **{name: n for n, name in enumerate(loaded.known, 1)}}
    mixes = choice is not None and not choice.reason
    rows = AdapterRows(numbers, slots, base.device, select, choice.set_rows if choice and mixes else None)
    decoder = Decoder(
        model, slots=slots, positions=positions, choose=chooser, assign=rows,
        variant=lambda: (chooser.variant, rows.variant),
        graphs=False if len(loaded.known) > 1 and not mixes else graphs,
    )  # fmt: skip
    rows.use({next(iter(loaded.known), "")})
    _prepare(decoder, chooser, ahead)
    later = base.device.type == "cuda"
    how = f"adapters take turns: {choice.reason}" if choice and choice.reason and len(loaded.known) > 1 else ""
    launched = f"steps are launched without CUDA graphs: {decoder.refused}" if later and decoder.refused else ""
    return Batched(decoder, chooser, line, rows, slots=slots, tells_later=later), _joined(
        how or launched, choice.note if choice else ""
    )


def _prepare(decoder: Decoder, chooser: Chooser, ahead: Sequence[Sampling]) -> None:
    """Have steps compiled and captured for these settings. Raises PlanError if there is no memory for the cache."""
    try:
        for sampling in ahead:
            chooser.use([sampling])
            decoder.prepare()
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"keys and values of {decoder.slots} answers of {decoder.positions:,} tokens do not fit beside the model",
            try_="fewer of either: --slots or --batch, --context or --max-new-tokens",
        ) from error


def _is_dispatched(base: Any) -> bool:
    """Whether accelerate moves a model's tensors between devices: by hooks on the linears that are there."""
    return len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1


def _select(choice: AdapterChoice | None, known: Mapping[str, str], name: str) -> None:
    """Have one adapter compute all that comes."""
    if choice:
        choice.only(known.get(name, ""))


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _script(base: Any, speech: Speech) -> Script:
    ends = {*ends_of(base, speech.tokenizer), *speech.wording.ends}
    return Script(speech.tokenizer, ends, speech.wording.end_text)


def _vocabulary(base: Any) -> int:
    """Tokens that have a logit."""
    head = base.get_output_embeddings()
    width: int = getattr(head, "out_features", 0) or base.config.get_text_config(decoder=True).vocab_size
    return width
