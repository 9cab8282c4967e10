"""What does it take to answer several prompts at a time: how many bytes, where, how fast, and which cards would do?"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from qdist.core.errors import PlanError, SpecError
from qdist.core.machine.cards import CARDS, rates_for, rates_of
from qdist.core.machine.cluster import Cluster, Rates
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, ModelFacts
from qdist.core.planning.advice import NO_FLA
from qdist.core.planning.candidates import USABLE_SHARE
from qdist.core.planning.decoding import adapter_bytes, prompt_seconds, step_seconds, why_launched, why_one_by_one
from qdist.core.planning.inference import (
    LOGIT_BYTES,
    Footprint,
    Residence,
    cache_bytes,
    count_in_use,
    reside,
    work_bytes,
)
from qdist.core.planning.memory import LayerSizes, Sizes, TrainingShape, sizes
from qdist.core.planning.process_memory import CUDA_CONTEXT_BYTES, LIBRARIES_BYTES
from qdist.core.planning.resources import counts_of, dtype_of, liger_of, recurrence_of, rooms_of, shape_of
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.suggest import TooBigError
from qdist.core.text import GIB, format_bytes

PROMPT_TOKENS = 2048
"""Tokens of prompts that are let in at a step: answers at work wait for as long as reading them takes. A longer prompt
is let in alone."""
UNPACKED_SHARE = 0.75
"""Share of the available host memory that unpacked weights may take on a CPU, where they multiply fastest; the rest is
for keys, values and activations."""
USUAL_CONTEXT = 2048
"""Tokens of a prompt and its answer, unless told or the model has fewer positions."""
SHORT_PROMPT = 512
"""Tokens of the prompt whose time is told beside that of the longest."""
MOST_AT_A_TIME, MOST_ADAPTERS = 4096, 1024
_SMALLEST_CONTEXT = 256
"""Tokens of the shortest context that is suggested."""


class Questions(NamedTuple):
    """What is to be answered."""

    batch: int
    """Answers at a time."""
    context: int
    """Tokens of a prompt and its answer together, at most."""
    adapters: int = 1
    """Adapters of one base that are loaded; 0 for the base alone."""

    @property
    def tokens(self) -> int:
        """Positions of all answers at a time."""
        return self.batch * self.context


class AnsweringBytes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of a model that answers, on all GPUs together, at the peak."""

    weights: int
    adapters: int
    """In 16 bits; while a model is loaded they are in float32, which counts where it takes more than the cache then."""
    cache: int
    """Keys and values of every answer at its longest."""
    logits: int
    work: int
    """Activations of the longest prompt, and what a layer unpacks."""
    context: int
    """Of CUDA and its kernels; on a CPU of the process and its libraries."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(msgspec.structs.astuple(self))


class CardFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card that holds all of it."""

    title: str
    gib: int
    tokens_per_second: float
    """Of one answer at a time, by the card's data sheet."""


class AnsweringPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model would answer on a machine. Seconds and tokens/s are 0 where the device's speed is unknown."""

    spec: RunSpec
    facts: ModelFacts
    gptq: Gptq | None
    mxfp4: bool
    """Whether experts are in MXFP4."""
    batch: int
    context: int
    adapters: int
    device: Literal["cuda", "cpu"]
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    liger: bool
    """Whether Liger's kernels run."""
    residence: Residence
    memory: AnsweringBytes
    filled: int
    """Tokens of an answer in the cache, in the mean, for which speeds are predicted."""
    tokens_per_second_alone: float
    """Of one answer at a time."""
    tokens_per_second: float
    """Of all answers of the batch together."""
    prompt_s: float
    """Seconds to the first token of a prompt as long as the context."""
    short_prompt_tokens: int
    short_prompt_s: float
    cards: tuple[CardFit, ...]
    """Cards that hold all of it, the smallest first; of as large ones the fastest first."""
    notes: tuple[str, ...]


def answers_in_words(plan: AnsweringPlan) -> str:
    """'21.4 GiB, backbone on GPU 0'."""
    return f"{format_bytes(plan.memory.total)}, {plan.residence}"


def answering_footprint(parts: Sizes, questions: Questions) -> Footprint:
    """Memory of a model with `batch` rows of `context` positions in its cache.

    parts: of the model with all adapters: its job's rank is the sum of theirs.
    """
    return count_in_use(
        parts,
        tokens=questions.tokens,
        at_a_time=_at_a_time(questions),
        scored=questions.batch,
        adapters=[_adapter_bytes(*each, parts.job, questions) for each in _layers(parts)],
    )


def _layers(parts: Sizes) -> list[tuple[LayerShape, LayerSizes]]:
    return list(zip(parts.facts.shapes, parts.layers, strict=True))


def _at_a_time(questions: Questions) -> int:
    return max(PROMPT_TOKENS, questions.context)


def _adapter_bytes(shape: LayerShape, own: LayerSizes, job: TrainingShape, questions: Questions) -> int:
    """Bytes of a layer's adapters: as they answer, or as they were loaded, in float32 and without a cache beside."""
    linears = list(shape.targeted(job.targets))
    of_experts = own.trained - sum(job.adapter.parameters(linear, job.rank_r) for linear in linears)
    answering = adapter_bytes(linears, job) + 4 * of_experts
    cached = cache_bytes(shape, job.compute_bytes, questions.tokens)
    return max(answering, 4 * own.trained - cached)


def memory_of_answers(parts: Sizes, questions: Questions, *, device: Literal["cuda", "cpu"]) -> AnsweringBytes:
    """The same by what it is for, wherever it is."""
    facts, job = parts.facts, parts.job
    tokens, counts = questions.batch * questions.context, [run.count for run in facts.layers]
    layers = list(zip(_layers(parts), counts, strict=True))
    return AnsweringBytes(
        weights=parts.embedding + parts.head + sum(own.packed * count for (_, own), count in layers),
        adapters=sum(_adapter_bytes(*each, job, questions) * count for each, count in layers),
        cache=sum(cache_bytes(shape, job.compute_bytes, tokens) * count for (shape, _), count in layers),
        logits=questions.batch * facts.vocab * LOGIT_BYTES,
        work=work_bytes(facts, job.compute_bytes, min(tokens, _at_a_time(questions))),
        context=CUDA_CONTEXT_BYTES if device == "cuda" else LIBRARIES_BYTES,
    )


def plan_answers(
    spec: RunSpec,
    facts: ModelFacts,
    cluster: Cluster,
    questions: Questions,
    *,
    config: Mapping[str, Any],
    gptq: Gptq | None = None,
    has_liger: bool = False,
    no_fla: str = NO_FLA,
) -> AnsweringPlan:
    """Decide where a model lies that answers, and predict how fast. Suggestions of a refusal are untried.

    config: the content of the model's config.json. has_liger: whether liger-kernel is installed. no_fla: why
    flash-linear-attention is not used; empty if it is.
    Raises TooBigError, with the missing bytes, where it does not fit, and SpecError for what cannot be asked.
    """
    _require_sensible(facts, questions)
    rooms, dtype = rooms_of(spec, cluster, counts_of(spec, cluster)), dtype_of(spec, cluster)
    shape = shape_of(
        spec, facts, cluster, config=config, gptq=gptq, dtype=dtype, liger=liger_of(spec, cluster, has_liger),
        recurrence=recurrence_of(facts, cluster, fla=not no_fla),
    )  # fmt: skip
    packed = sizes(facts, _with_adapters(shape, questions))
    parts = _as_kept(packed, cluster)
    memory = memory_of_answers(parts, questions, device=cluster.device)
    residence = _residence(spec, parts, questions, cluster, rooms, memory)
    rates, rate_notes = rates_for(cluster)
    speeds, longest = _Speeds(parts, questions, residence), questions.context - 1
    return AnsweringPlan(
        spec=spec, facts=facts, gptq=gptq, mxfp4=shape.mxfp4, **questions._asdict(), device=cluster.device,
        compute_dtype=dtype, liger=shape.fused_layers, residence=residence, memory=memory, filled=speeds.filled,
        tokens_per_second_alone=speeds.tokens_per_second(rates, 1),
        tokens_per_second=speeds.tokens_per_second(rates, questions.batch),
        prompt_s=speeds.prompt_s(rates, longest),
        short_prompt_tokens=min(SHORT_PROMPT, longest),
        short_prompt_s=speeds.prompt_s(rates, min(SHORT_PROMPT, longest)),
        cards=cards_for(packed, questions) if rooms else (),
        notes=(*rate_notes, *_notes(parts, questions, residence, rooms)),
    )  # fmt: skip


def _with_adapters(shape: TrainingShape, questions: Questions) -> TrainingShape:
    """What is computed with all adapters on: their ranks together are one's."""
    targets = shape.targets if questions.adapters else ()
    rank_r = shape.rank_r * questions.adapters
    return msgspec.structs.replace(shape, rank_r=rank_r, targets=targets, seq_len=questions.context)


def _require_sensible(facts: ModelFacts, questions: Questions) -> None:
    """Raise SpecError for numbers out of range."""
    ranges = {
        "batch": (1, MOST_AT_A_TIME), "context": (2, facts.max_positions), "adapters": (0, MOST_ADAPTERS),
    }  # fmt: skip
    for name, value in questions._asdict().items():
        least, most = ranges[name]
        if not least <= value <= most:
            of_model = f", the positions of {facts.name}" if name == "context" else ""
            raise SpecError(
                f"--{name} {value:,} is not between {least:,} and {most:,}{of_model}",
                ways=[{name: min(max(value, least), most)}],
            )


def _as_kept(parts: Sizes, cluster: Cluster) -> Sizes:
    """The parts as they are while the model answers: a CPU keeps linears unpacked if it has the memory."""
    unpacked = parts.facts.linear_weights * parts.job.compute_bytes
    if cluster.device != "cpu" or parts.facts.expert_parameters or unpacked > UNPACKED_SHARE * cluster.memory_bytes:
        return parts
    return sizes(parts.facts, msgspec.structs.replace(parts.job, bits=16, gptq=None))


def _residence(
    spec: RunSpec,
    parts: Sizes,
    questions: Questions,
    cluster: Cluster,
    rooms: tuple[int, ...] | None,
    memory: AnsweringBytes,
) -> Residence:
    """Where it lies. Raises TooBigError if it does not fit."""
    ways = _ways_to_fit(spec, questions, memory)
    if rooms is None:
        usable = int(USABLE_SHARE * cluster.memory_bytes)
        if memory.total > usable:
            raise TooBigError(
                f"answering takes {format_bytes(memory.total)} of host memory, {format_bytes(memory.total - usable)} "
                f"more than the {format_bytes(usable)} that may be filled",
                ways=ways,
            )
        return Residence()
    try:
        return reside(answering_footprint(parts, questions), rooms, host_bytes=cluster.memory_bytes)
    except PlanError as error:
        missing = memory.total - sum(rooms)
        more = f", {format_bytes(missing)} more than may be filled" if missing > 0 else ""
        raise TooBigError(f"answering takes {format_bytes(memory.total)}{more}: {error.message}", ways=ways) from error


def _ways_to_fit(spec: RunSpec, questions: Questions, memory: AnsweringBytes) -> list[Mapping[str, Any]]:
    """Changes that take less memory, the smallest first."""
    ways: list[Mapping[str, Any]] = []
    context, batch = questions.context // 2, questions.batch // 2
    while context >= _SMALLEST_CONTEXT:
        ways.append({"context": context})
        context //= 2
    while batch:
        ways.append({"batch": batch})
        batch //= 2
    if spec.method == "qlora" and spec.bits > 4:
        ways.append({"bits": 4})
    need = memory.total / USABLE_SHARE / GIB
    ways += [{"gpu_memory": f"{gib}GiB"} for gib in sorted({card.gib for card in CARDS}) if gib >= need]
    return ways


class _Speeds:
    """How fast a model answers where it lies."""

    def __init__(self, parts: Sizes, questions: Questions, residence: Residence) -> None:
        self.parts, self.residence = parts, residence
        self.filled = -(-questions.context // 2)
        footprint = answering_footprint(parts, questions)
        self._fetched = sum(footprint.waiting[layer] for layer in residence.offloaded)
        self.captured = len(residence.gpus) == 1 and not self._fetched and not why_launched(parts.facts, parts.job)

    def tokens_per_second(self, rates: Rates | None, rows: int) -> float:
        """Of so many answers together; 0 if nothing is known of the device."""
        if rates is None:
            return 0.0
        step_s = step_seconds(self.parts, rates, rows, filled=self.filled, captured=self.captured)
        passes = rows if why_one_by_one(self.parts.facts) else 1
        return rows / (step_s + passes * self._fetched / rates.host_bytes_s)

    def prompt_s(self, rates: Rates | None, tokens: int) -> float:
        """Seconds to the first token; 0 if nothing is known of the device."""
        if rates is None:
            return 0.0
        return prompt_seconds(self.parts, rates, tokens) + self._fetched / rates.host_bytes_s


def cards_for(parts: Sizes, questions: Questions) -> tuple[CardFit, ...]:
    """Cards of the table that hold all of it alone."""
    need = answering_footprint(parts, questions).alone
    alone = _Speeds(parts, questions, Residence(layer_gpu=(0,) * parts.facts.layer_count))
    found = [
        CardFit(title=card.title, gib=card.gib, tokens_per_second=alone.tokens_per_second(rates_of(card.title), 1))
        for card in CARDS
        if need <= USABLE_SHARE * card.gib * GIB
    ]
    return tuple(sorted(found, key=lambda card: (card.gib, -card.tokens_per_second)))


def _notes(parts: Sizes, questions: Questions, residence: Residence, rooms: tuple[int, ...] | None) -> list[str]:
    """What makes it slower than it could be, and what further GPUs are for."""
    reason = why_launched(parts.facts, parts.job)
    if one_by_one := why_one_by_one(parts.facts):
        found = [f"each answer has a pass of its own for every token: {one_by_one}"]
    else:
        found = [f"steps are launched kernel by kernel: {reason}"] if reason and rooms else []
    if rooms is None:
        return [*found, "speed is not predicted on a CPU"]
    if residence.offloaded:
        return [*found, "offloaded layers are copied to the GPU for every token"]
    if (count := len(residence.gpus)) > 1:
        return [*found, f"{count} GPUs hold one model: one of them works at a time, launched kernel by kernel"]
    alone = answering_footprint(parts, questions).alone
    copies = sum(alone <= own for own in rooms)
    return [*found, *[f"speeds are of one GPU; qdist generate deals prompts to {copies}"] * (copies > 1)]
