"""Are all numbers of a tensor finite?"""

import torch

from qdist.core.errors import ModelError
from qdist.core.units import counted


def is_finite(value: torch.Tensor) -> bool:
    """False for NaN or infinity anywhere. `isfinite` of a whole table takes seven times as long, and makes copies."""
    if not value.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def require_finite(value: torch.Tensor, name: str, *, try_: str = "download the model again") -> torch.Tensor:
    """The tensor. Raises ModelError where it cannot be packed: with how many of its values are no numbers."""
    if value.is_floating_point() and not is_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise ModelError(
            f"{name} holds NaN or infinite numbers: {counted(bad, 'value')} of {value.numel():,}",
            try_=try_,
        )
    return value
