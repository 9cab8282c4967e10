"""Which kernels compute a model, in words for plan, doctor and run?"""

from collections.abc import Sequence

import msgspec

FAST_KERNELS = {
    "flash-linear-attention": "kernels of Gated DeltaNet and Kimi's attention: without them models of which these are "
    "most layers (Qwen3.5) train 1.5 to 1.7 times slower, on torch's operations",
    "causal-conv1d": "convolutions of recurrent layers: without them torch's operations run, slower",
    "mamba-ssm": "scans of Mamba layers: without them torch's operations run, several times slower",
    "kernels": "kernels from the Hugging Face Hub, which qdist does not ask for",
}
"""Optional packages of kernels, by distribution, and what they are for and what their absence costs."""


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes each part of a model, as a phrase to follow the part's name; empty where it has no such part."""

    attention: str = ""
    loss: str = ""
    norms: str = ""
    recurrence: str = ""
    experts: str = ""

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
