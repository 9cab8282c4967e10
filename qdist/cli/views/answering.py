"""How a model would answer, as lines for a person."""

from collections.abc import Iterator

from qdist.cli.views.model_parts import experts_lines, weights_in_words
from qdist.core.planning.answering import AnsweringPlan
from qdist.core.text import counted, format_bytes, format_count, format_duration

_PARTS = ("weights", "adapters", "cache", "logits", "work", "context")
_CARDS = 6
"""Cards that are named, each of another size of memory."""


def answering_lines(plan: AnsweringPlan, *, notes: tuple[str, ...] = ()) -> list[str]:
    """What answers, what it holds and where, how fast it is, and which cards would do."""
    spec = plan.spec
    weights = weights_in_words(spec, plan.gptq, mxfp4=plan.mxfp4)
    return [
        f"model    {spec.model}: {format_count(plan.facts.parameters)} parameters, {weights}, "
        f"{plan.compute_dtype} arithmetic",
        *experts_lines(plan.facts),
        f"adapters {plan.adapters} of r={spec.lora.r}" if plan.adapters else "adapters none",
        f"answers  {plan.batch:,} at a time, each of up to {plan.context:,} tokens with its prompt",
        f"place    {plan.residence}",
        f"memory   {format_bytes(plan.memory.total)}{_places(plan)}",
        f"         at the peak: {_parts(plan)}",
        *_speed(plan),
        *_cards(plan),
        *(f"note     {note}" for note in (*notes, *plan.notes)),
    ]


def _places(plan: AnsweringPlan) -> str:
    if plan.device == "cpu":
        return " of host memory"
    return " altogether" if len(plan.residence.gpus) > 1 or plan.residence.offloaded else ""


def _parts(plan: AnsweringPlan) -> str:
    parts = ((name, getattr(plan.memory, name)) for name in _PARTS)
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)


def _speed(plan: AnsweringPlan) -> Iterator[str]:
    if not plan.tokens_per_second:
        return
    several = ""
    if plan.batch > 1:
        together, each = plan.tokens_per_second, plan.tokens_per_second / plan.batch
        several = f"; {plan.batch:,} together {_rate(together)}, {_rate(each)} each"
    yield f"speed    one answer {_rate(plan.tokens_per_second_alone)}{several}"
    yield f"         predicted for answers at {plan.filled:,} tokens, in the mean, with their prompts"
    first = f"{_seconds(plan.prompt_s)} after a prompt of {plan.context - 1:,} tokens"
    short = f", {_seconds(plan.short_prompt_s)} after {plan.short_prompt_tokens:,}"
    yield f"first    token {first}{short * (plan.short_prompt_tokens < plan.context - 1)}"


def _rate(tokens_per_second: float) -> str:
    digits = 0 if tokens_per_second >= 100 else 1 if tokens_per_second >= 10 else 2
    return f"{tokens_per_second:,.{digits}f} tokens/s"


def _seconds(seconds: float) -> str:
    if seconds >= 60:
        return format_duration(seconds)
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _cards(plan: AnsweringPlan) -> Iterator[str]:
    """The fastest card of each size of memory that holds all of it."""
    if plan.device == "cpu":
        return
    if not plan.cards:
        yield "cards    none holds it alone"
        return
    fastest = {card.gib: card for card in reversed(plan.cards)}  # of as large ones the fastest comes first
    named = [fastest[gib] for gib in sorted(fastest)][:_CARDS]
    for index, card in enumerate(named):
        yield f"{'' if index else 'cards':8} {card.title}, {card.gib} GiB: one answer {_rate(card.tokens_per_second)}"
    if others := len(plan.cards) - len(named):
        yield f"         and {counted(others, 'more card')} that would do"
