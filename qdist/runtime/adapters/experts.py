"""LoRA on the experts of a layer, in the layout of PEFT's `target_parameters`."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from qdist.runtime.model.experts import LAST, Factors, first_name, is_experts


class ExpertLora(ParamWrapper):
    """PEFT's adapter of a parameter [experts, out, in]: A [experts x r, in], B [out, r x experts].

    Where PEFT adds a dense update to the parameter, this hands the factors to the experts' own forward pass. Adapters
    of a second parameter of the module lie around those of the first, as PEFT nests them.
    """

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Create an adapter's matrices without values: drawing some that are drawn again by name takes seconds."""
        with torch.device("meta"):
            super().update_layer(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Give an adapter zeros where the experts compute: whoever asked for it fills it."""
        for matrices in (self.lora_A, self.lora_B):
            matrix = matrices[adapter_name].to_empty(device=device or device_of(self.get_base_layer()))
            nn.init.zeros_(matrix.weight)

    def forward(self, *args: Any, factors: Mapping[str, Factors] | None = None) -> torch.Tensor:
        """As the experts' forward pass. factors: of the adapters around this one."""
        given = dict(factors or {})
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if names:
            (name,) = names  # several at once have no sum in this layout
            given[self.parameter_name] = self.factors(name)
        output: torch.Tensor = self.base_layer(*args, factors=given)
        return output

    def factors(self, name: str) -> Factors:
        """An adapter's matrices, an expert at a time."""
        count, (down, up) = self.num_experts, (side[name].weight for side in (self.lora_A, self.lora_B))
        return Factors(
            down.view(count, -1, down.shape[1]),
            up.view(up.shape[0], -1, count).permute(2, 0, 1),
            self.scaling[name],
        )


def device_of(experts: nn.Module) -> torch.device:
    """Where an experts' module computes."""
    place: torch.device = getattr(experts, "runs_on", next(experts.parameters()).device)
    return place


def adapt_experts(model: nn.Module, config: Any, parameters: tuple[str, ...]) -> None:
    """Put an adapter of each parameter around the experts of a PEFT model, in the order in which PEFT would.

    config: PEFT's. parameters: their paths in a layer.
    """
    for path, module in list(model.named_modules()):
        if not is_experts(module):
            continue
        wrapped: nn.Module = module
        for name in (first_name(module), LAST):
            if f"{path}.{name}".endswith(tuple(f".{each}" for each in parameters)):
                wrapped = ExpertLora(
                    wrapped, "default", parameter_name=name, config=config, r=config.r, lora_alpha=config.lora_alpha
                )
        model.set_submodule(path, wrapped)
