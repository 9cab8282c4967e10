"""Which machine is it that somebody describes by the names and the memory of its cards?"""

import re

from qdist.core.errors import SpecError
from qdist.core.machine.cards import memory_of
from qdist.core.machine.cluster import MOST_RANKS, UNNAMED, Cluster, hypothetical, machine_of
from qdist.core.text import parse_bytes


def described(
    *, gpus: int | None, gpu_name: str | None, gpu_memory: str | None, host_memory_bytes: int | None = None
) -> Cluster:
    """The machine to plan for: as many GPUs as are asked for of one card, or each GPU of a machine of several cards.

    gpu_name, gpu_memory: of every card, or of each: 'RTX 3090 + RTX 4090', '2 x 24GiB + 48GiB'. Memory is that of the
    named cards unless told.

    Raises SpecError for unknown cards, for what is no amount of memory, and where names and amounts differ in number.
    """
    names = (UNNAMED,) if gpu_name is None else each_card(gpu_name, "gpu_name")
    amounts = () if gpu_memory is None else each_card(gpu_memory, "gpu_memory")
    sizes = tuple(parse_bytes(amount, "gpu_memory") for amount in amounts)
    sizes = sizes or tuple(memory_of(name, typed=gpu_name) for name in names)
    if len(names) == len(sizes) == 1:
        return hypothetical(gpus or 1, sizes[0], name=names[0], host_memory_bytes=host_memory_bytes)
    count = max(len(names), len(sizes))
    if {len(names), len(sizes)} - {1, count}:
        raise SpecError(
            f"{len(names)} cards are named, and memory is given for {len(sizes)}",
            ways=[{"gpu_memory": amounts[0]}, {"gpu_name": names[0]}],
        )
    pairs = zip(names * (count // len(names)), sizes * (count // len(sizes)), strict=True)
    return machine_of(tuple(pairs), host_memory_bytes=host_memory_bytes)


def each_card(text: str, flag: str) -> tuple[str, ...]:
    """'2 x 24GiB + 48GiB' -> ('24GiB', '24GiB', '48GiB'); the same of names.

    Raises SpecError for none, and for more cards than a machine can have. flag: where it was typed.
    """
    found: list[str] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,9})\s*x\s*(.+)", part, re.IGNORECASE)
        count, own = (int(match[1]), match[2]) if match else (1, part)
        if not 1 <= count <= MOST_RANKS - len(found):
            raise SpecError(
                f"{text!r} are {'no' if count < 1 else 'too many'} cards: a machine to plan for has 1 to {MOST_RANKS}",
                ways=[{flag: own.strip()}],
            )
        found += [own.strip()] * count
    return tuple(found)
