"""Which kernels compute a model, in words for plan, doctor and run?"""

from collections.abc import Sequence

import msgspec

FAST_KERNELS = {
    "flash-linear-attention": "Gated DeltaNet and Kimi's attention; Qwen3.5 trains 1.5 to 1.7 times slower without",
    "causal-conv1d": "convolutions of recurrent layers; slower without",
    "mamba-ssm": "scans of Mamba layers; several times slower without",
    "kernels": "from the Hugging Face Hub; qdist does not use them",
}
"""Optional packages of kernels, by distribution, and what they are for and what their absence costs."""


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes each part of a model, as a phrase to follow the part's name; empty where it has no such part."""

    attention: str = ""
    loss: str = ""
    norms: str = ""
    recurrence: str = ""
    experts: str = ""
    passes: str = ""
    products: str = ""
    """Only where the backbone's linears do not multiply in the run's dtype."""

    @property
    def words(self) -> tuple[str, ...]:
        """A phrase for each part: 'attention sdpa'."""
        return tuple(f"{name} {phrase}" for name, phrase in msgspec.structs.asdict(self).items() if phrase)


def joined(parts: Sequence[Kernels]) -> Kernels:
    """The kernels of a model whose parts different ranks hold; where they differ, all are named."""
    named = {
        field.name: dict.fromkeys(getattr(part, field.name) for part in parts)
        for field in msgspec.structs.fields(Kernels)
    }
    return Kernels(**{name: " and ".join(filter(None, phrases)) for name, phrases in named.items()})
