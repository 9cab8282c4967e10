"""What `qdist doctor --gpus` measures on each card, and the one set of rates that the planner makes of it."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from qdist.core.machine.cluster import Rates
from qdist.core.machine.kernel_rates import KernelRates, slowest_kernels


class LinkRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One card's links to the others, all cards at work at once. Rates count the bytes that this card receives."""

    gather_bytes_s: float
    reduce_bytes_s: float
    """Bytes/s of a float32 all-reduce, which moves 2 (n - 1) / n of the buffer to each card."""
    peer_bytes_s: float | None
    """Bytes/s of card-to-card copies without NCCL, to the slowest peer; None on the CPU."""
    checked_bytes: int
    """Bytes of each kind that were compared with what had been sent."""
    wrong_gathered_bytes: int
    wrong_reduced_values: int
    wrong_peer_bytes: tuple[tuple[int, int], ...] = ()
    """(card copied to, bytes that arrived as others), only of cards where some did."""


class CardRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates that one rank measured on its card."""

    rank: int
    name: str
    dtype: str
    """Dtype of the matrix products."""
    matmul_flops_s: float
    memory_bytes_s: float
    linear_s: float
    """Seconds to launch the kernels of an adapted 4-bit linear, forward and backward."""
    round_trip_error: float
    """Largest error of 4 bits and back on the card, as a share of its block's largest value. NF4 allows 0.152."""
    round_trip_differs: float
    """Largest difference between the same bits unpacked by the card and by the CPU, in the same unit."""
    host_bytes_s: float | None = None
    """Bytes/s from host to card; None until the links are measured, which may fail."""
    links: LinkRates | None = None
    """Rates of the links; None for a single card."""
    kernels: KernelRates | None = None
    """Rates of the kernels of a step; None on the CPU."""


def slowest(cards: Sequence[CardRates], *, source: str) -> Rates | None:
    """What every card of the machine can be counted on for; None unless all of them were measured to the end.

    A card alone has no links; what would travel over them would go through the host.
    """
    host = [card.host_bytes_s for card in cards if card.host_bytes_s is not None]
    links = [card.links.gather_bytes_s for card in cards if card.links is not None]
    if not cards or len(host) < len(cards) or (len(cards) > 1 and len(links) < len(cards)):
        return None
    return Rates(
        matmul_flops_s=min(card.matmul_flops_s for card in cards),
        memory_bytes_s=min(card.memory_bytes_s for card in cards),
        link_bytes_s=min(links or host),
        host_bytes_s=min(host),
        linear_s=max(card.linear_s for card in cards),
        kernels=slowest_kernels([card.kernels for card in cards]),
        source=source,
    )


def least(several: Sequence[Rates]) -> Rates:
    """The rates of a machine of different cards, each figure of the card that is slowest in it."""
    return Rates(
        matmul_flops_s=min(rates.matmul_flops_s for rates in several),
        memory_bytes_s=min(rates.memory_bytes_s for rates in several),
        link_bytes_s=min(rates.link_bytes_s for rates in several),
        host_bytes_s=min(rates.host_bytes_s for rates in several),
        linear_s=max(rates.linear_s for rates in several),
        kernels=slowest_kernels([rates.kernels for rates in several]),
        source=several[0].source,
    )


def machine_key(names: Sequence[str], driver: str) -> str:
    """Key that rates are valid for: cards by name and number, and the driver."""
    cards = "+".join(f"{name}_x{count}" for name, count in sorted(Counter(names).items()))
    return f"{cards}_{driver}"
