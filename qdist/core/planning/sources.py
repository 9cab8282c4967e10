"""What each source gives to a run, in words for a plan and a report."""

from collections.abc import Iterator

from qdist.core.planning.plan import DataFacts
from qdist.core.text import counted


def sources_in_words(data: DataFacts) -> tuple[str, ...]:
    """'a.jsonl: 70 % of the samples, from 6,000' for each of several sources; empty for one alone."""
    return tuple(_each(data)) if len(data.parts) > 1 else ()


def epoch_in_words(data: DataFacts) -> str:
    """'8,572 samples', or those of an epoch of a mixture."""
    of_mixture = " of the mixture" if data.mixture else ""
    return f"{data.epoch:,} samples{of_mixture}"


def _each(data: DataFacts) -> Iterator[str]:
    total = sum(part.weight or 0.0 for part in data.parts)
    for part in data.parts:
        samples = counted(part.samples, "sample")
        if part.held_out:
            yield f"{part.name}: {samples}, evaluated on"
        elif part.weight is not None:
            yield f"{part.name}: {100 * part.weight / total:.3g} % of the samples, from {part.samples:,}"
        else:
            yield f"{part.name}: {samples}"
