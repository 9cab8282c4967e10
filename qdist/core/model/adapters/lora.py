"""What does LoRA count? Hu et al. 2021: B A beside a linear, A [r, in] and B [out, r]."""

from collections.abc import Iterable
from typing import ClassVar, Self

import msgspec

from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.core.spec.run_spec import RunSpec


class LoraMethod(msgspec.Struct, frozen=True):
    """What planner and storage ask of a method: LoRA's answers, for any backbone, which other methods override."""

    pool: int = 1
    """Inputs that share a column of A and of the update."""
    merges_exactly: ClassVar[bool] = False
    """Whether merging keeps every bit of the backbone; otherwise the sum is rounded to 16 bits."""
    gradient_reads: ClassVar[int] = 1
    """Times that the gradient of A reads a linear's inputs."""

    @property
    def title(self) -> str:
        """Name of the method in plans and reports."""
        return "LoRA"

    @classmethod
    def of_run(cls, spec: RunSpec, gptq: Gptq | None, facts: ModelFacts) -> Self:
        """The adapter method of a run. Raises SpecError if the model does not support it."""
        return cls()

    def matrices(self, linear: Linear, rank: int) -> tuple[int, ...]:
        """Trained parameters of each matrix beside one linear."""
        return rank * (linear.inputs // self.pool), rank * linear.outputs

    def parameters(self, linear: Linear, rank: int) -> int:
        """Trained parameters beside one linear."""
        return sum(self.matrices(linear, rank))

    def saved_inputs(
        self,
        shape: LayerShape,
        adapted: tuple[Linear, ...],
        compute_bytes: int,
        *,
        casts: bool,
        dropout: bool,
        shared: bool,
    ) -> int:
        """Bytes per token of what a layer's A matrices keep of their inputs for the backward pass.

        casts: peft casts the inputs to float32 and keeps those. dropout: on those inputs.
        shared: our own linears, which keep what they read once, whatever a norm hands on, and no masks.
        One tensor serves all that read it, unless each reader makes its own: dropout gives each a masked copy and a
        mask (bytes on a GPU, floats on a CPU); peft casts the input of a 16-bit linear to fp32, and a layer norm leaves
        autocast in fp32, so each reader casts its own back.
        """
        autocast = compute_bytes < 4
        own = sum(linear.inputs for linear in adapted)
        read = {(linear.reads, linear.inputs, linear.within * (linear.reads == "mlp_out")) for linear in adapted}
        if shape.attention == "flash" and shape.mixer == "attention" and not shape.output_gate:
            read = {each for each in read if each[0] != "attention_out"}  # attention has kept it already
        widths = sum(inputs for _, inputs, _ in read)
        if dropout and not shared:
            kept = shape.inner * (shape.mlp == "relu")
            return (own + kept) * compute_bytes + own * (1 if autocast else 4)
        if casts:
            return own * compute_bytes
        if shape.mlp == "relu" and not any(linear.reads == "mlp_out" for linear in adapted):
            widths += shape.inner
        behind_norms = [linear for linear in adapted if linear.reads in ("attention_in", "mlp_in")]
        copies = len(behind_norms) - len({linear.reads for linear in behind_norms})
        extra = copies * shape.hidden if autocast and shape.norm == "layer" and not shared else 0
        return (widths + extra) * compute_bytes

    @staticmethod
    def require_packed(spec: RunSpec, gptq: Gptq, facts: ModelFacts, paths: Iterable[str]) -> None:
        """Refuse a GPTQ checkpoint that leaves in 16 bits what the method needs packed.

        paths: of all linears that could be quantized. Raises SpecError naming the first.
        """
