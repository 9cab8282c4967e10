"""Which kernels compute a model, in words for plan, doctor and run."""

import msgspec

FAST_KERNELS = {
    "flash-linear-attention": "Gated DeltaNet and Kimi's attention: without it torch computes them, and models of "
    "which they are most layers (Qwen3.5) train 1.5 to 1.7 times slower",
    "causal-conv1d": "convolutions of recurrent layers: without it torch computes them, slower",
    "mamba-ssm": "scans of Mamba layers: without it torch computes them, several times slower",
    "kernels": "kernels from the Hugging Face Hub: not used by qdist",
}
"""Optional packages with kernels, by the names of their distributions -> what they are for and what their lack costs."""


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes each part of a model, as phrases. Empty for parts that the model does not have."""

    attention: str = ""
    loss: str = ""
    norms: str = ""
    recurrence: str = ""
    experts: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """One line a part: its name and the phrase."""
        named = {name: getattr(self, name) for name in self.__struct_fields__}
        return tuple(f"{name}: {phrase}" for name, phrase in named.items() if phrase)
