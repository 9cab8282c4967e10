"""AdamW over an adapter: which of its forms is built, with which rates, and where are its moments?"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALES = ("exp_avg_scales", "exp_avg_sq_scales")
"""Largest magnitudes of each block of 256 numbers of an 8-bit moment, as checkpoints call them."""
_BNB_NAMES = {
    "exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scales": "absmax1", "exp_avg_sq_scales": "absmax2",
}  # fmt: skip
"""bitsandbytes' names for Adam's moments, and for the scales of 8-bit ones."""


def build_optimizer(
    named: Mapping[str, nn.Parameter],
    *,
    name: str,
    fused: bool,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ratio_b: float = 1.0,
    capturable: bool = False,
) -> Any:
    """AdamW over float32 parameters: torch's, or bitsandbytes' paged or 8-bit one. The loop sets the rate.

    named: the parameters by their names in the model. ratio_b: the rate of B matrices over that of all others.
    capturable: torch's alone, with `fused`: rates are tensors on the parameters' device, as a CUDA graph needs them.
    """
    groups = _groups_of(named, ratio_b)
    if name == "adamw":
        if capturable:
            for group in groups:
                group["lr"] = torch.zeros((), dtype=torch.float32, device=group["params"][0].device)
        return torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused, capturable=capturable
        )
    from bitsandbytes.optim import AdamW8bit, PagedAdamW32bit

    kind = {"adamw-8bit": AdamW8bit, "paged-adamw": PagedAdamW32bit}[name]
    return kind(groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)


def _groups_of(named: Mapping[str, nn.Parameter], ratio_b: float) -> list[dict[str, Any]]:
    """Parameter groups with the ratio of their rate to the run's: one, or two for LoRA+ (Hayou et al. 2024)."""
    if ratio_b == 1:
        return [{"params": list(named.values())}]
    groups: dict[float, list[nn.Parameter]] = {1.0: [], ratio_b: []}
    for name, parameter in named.items():
        groups[ratio_b if ".lora_B." in name else 1.0].append(parameter)
    return [{"params": parameters, "ratio": ratio} for ratio, parameters in groups.items() if parameters]


def set_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every parameter group this rate times its ratio. Does not wait for the device."""
    for group in optimizer.param_groups:
        own = learning_rate * group.get("ratio", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def update_parameters(optimizer: Any) -> None:
    """One step of the optimizer with the gradients and rates that are there.

    bitsandbytes' own `step` waits for the GPU after each matrix, which only paged moments need.
    """
    if not hasattr(optimizer, "update_step") or optimizer.is_paged:
        optimizer.step()
        return
    with torch.no_grad():
        for group, parameter, at in _each(optimizer):
            if parameter.grad is not None:
                if not optimizer.state[parameter]:
                    optimizer.init_state(group, parameter, *at)
                optimizer.update_step(group, parameter, *at)


def _each(optimizer: Any) -> Iterator[tuple[dict[str, Any], nn.Parameter, tuple[int, int]]]:
    """(group, parameter, their indices) of all parameters, as bitsandbytes wants them."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield group, parameter, (group_index, index)


def allocate_moments(optimizer: Any, steps: int) -> None:
    """Create Adam's state as after `steps` steps, with moments still zero."""
    for group, parameter, at in _each(optimizer):
        if hasattr(optimizer, "init_state"):  # bitsandbytes
            optimizer.init_state(group, parameter, *at)
            optimizer.state[parameter]["step"] = steps
        else:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device if group.get("fused") else "cpu"),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }


def optimizer_steps(optimizer: Any) -> int:
    """Steps counted by Adam, which leaves out skipped ones."""
    states = [state for state in optimizer.state.values() if "step" in state]
    return int(states[0]["step"]) if states else 0


def collect_moments(optimizer: Any, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
    """The moments of whole parameters, {'exp_avg': {name: tensor}, ...}; empty before the first step.

    8-bit moments come as they are, uint8 with scales beside them: quantized anew they would not be the same bytes,
    since the signed code has 1 but not -1, and a block whose largest number is negative would shrink each time.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in named.items() if optimizer.state else ():
        state = optimizer.state[parameter]
        for moment in (*MOMENTS, *(scales for scales in _SCALES if _BNB_NAMES[scales] in state)):
            found.setdefault(moment, {})[name] = moment_of(state, moment)
    return found


def moment_key(state: Mapping[str, Any], moment: str) -> str:
    """Key of Adam's first or second moment, or its scales: torch's or bitsandbytes'."""
    return moment if moment in state else _BNB_NAMES[moment]


def moment_of(state: Mapping[str, Any], moment: str) -> torch.Tensor:
    """Adam's first or second moment, or its scales."""
    found = state[moment_key(state, moment)]
    assert isinstance(found, torch.Tensor)
    return found
