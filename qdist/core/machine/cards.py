"""How fast are common cards, by their data sheets, and which machine is described by the names of its cards?"""

import re
from difflib import get_close_matches

import msgspec

from qdist.core.errors import SpecError
from qdist.core.machine.cluster import MOST_RANKS, UNNAMED, Cluster, Gpu, Rates, hypothetical, machine_of
from qdist.core.machine.measured import least
from qdist.core.text import GIB, parse_bytes

MATMUL_SHARE = 0.68
"""Sustained share of the sheet's dense 16-bit rate: two H200s at once multiply 8192-wide bf16 matrices at 673 TFLOP/s
of 989 indefinitely, and at 790 briefly."""
MEMORY_SHARE = 0.90
"""Share of the sheet's bandwidth: 4.3 TB/s of 4.8 on an H200, reads and writes together."""
NVLINK_SHARE = 0.57
"""Share of one direction's bandwidth: 255 GB/s of 450 in all-gathers between two H200s over NVLink 4."""
PCIE_LINK_SHARE = 0.40
"""Share of one direction's bandwidth: without NVLink, rings cross the host, most often without peer access."""
HOST_SHARE = 0.80
"""Share of one direction of PCI Express, from pinned memory: 52 GB/s of 64."""
FP8_CAPABILITY = (8, 9)
"""The first compute capability whose matrix units multiply in fp8: Ada's."""


class Card(msgspec.Struct, frozen=True):
    """One card's data sheet. Rates in TFLOP/s, GB/s; dense, with 32-bit accumulation; links in one direction."""

    title: str
    """Common name of the card."""
    name: str
    """Pattern that matches NVML's name, lower-cased with single spaces."""
    gib: int
    tflops: float
    memory_gb_s: float
    pcie_gb_s: float
    nvlink_gb_s: float = 0.0
    bfloat16: bool = True
    """Whether its matrix units support bfloat16: from Ampere (2020) on."""
    fp8: bool = True
    """Whether they support fp8, at twice the 16-bit rate: from Ada and Hopper (2022) on."""


CARDS = (
    # The first that matches wins: a form with fewer words comes after those with more.
    # Where a sheet has no such figure, of GeForce cards from Ampere on twice the FP32 rate, which is what their matrix
    # units do with 32-bit accumulation; of Blackwell's others an eighth of the TOPS, which count sparse FP4.
    Card("B300", r"g?b300", 268, 2250, 8000, 128, 900),
    Card("B200", r"g?b200|b100", 180, 2250, 8000, 64, 900),
    Card("H200 NVL", r"h200 nvl", 140, 835, 4800, 64, 300),
    Card("H200", r"h200|gh200", 140, 989, 4800, 64, 450),
    Card("H100 NVL", r"h100 nvl", 94, 835, 3900, 64, 300),
    Card("H100 PCIe", r"h100 pcie", 80, 756, 2039, 64),
    Card("H100", r"h100", 80, 989, 3350, 64, 450),
    Card("A100-SXM4-80GB", r"a100.*sxm.*80gb", 80, 312, 2039, 32, 300, fp8=False),
    Card("A100 80GB PCIe", r"a100.*80gb", 80, 312, 1935, 32, fp8=False),
    Card("A100-SXM4-40GB", r"a100.*sxm\d", 40, 312, 1555, 32, 300, fp8=False),
    Card("A100-PCIE-40GB", r"a100", 40, 312, 1555, 32, fp8=False),
    Card("GB10", r"gb10", 119, 125, 273, 64),
    Card("RTX PRO 6000 Blackwell Max-Q", r"rtx pro 6000.*max q", 96, 439, 1792, 64),
    Card("RTX PRO 6000 Blackwell", r"rtx pro 6000", 96, 504, 1792, 64),
    Card("RTX PRO 5000 Blackwell", r"rtx pro 5000", 48, 258, 1344, 64),
    Card("RTX PRO 4000 Blackwell", r"rtx pro 4000", 24, 147, 672, 64),
    Card("RTX 6000 Ada", r"rtx 6000 ada", 48, 364, 960, 32),
    Card("L40S", r"l40s", 48, 362, 864, 32),
    Card("L40", r"l40", 48, 181, 864, 32),
    Card("L4", r"l4", 24, 121, 300, 32),
    Card("A40", r"a40", 48, 150, 696, 32, fp8=False),
    Card("A10G", r"a10g", 24, 70, 600, 32, fp8=False),
    Card("A10", r"a10", 24, 125, 600, 32, fp8=False),
    Card("RTX A6000", r"a6000", 48, 155, 768, 32, fp8=False),
    Card("RTX A5000", r"a5000", 24, 111, 768, 32, fp8=False),
    Card("RTX A4500", r"a4500", 20, 95, 640, 32, fp8=False),
    Card("RTX A4000", r"a4000", 16, 77, 448, 32, fp8=False),
    Card("RTX 5090", r"rtx 5090", 32, 209, 1792, 64),
    Card("RTX 5080", r"rtx 5080", 16, 113, 960, 64),
    Card("RTX 5070 Ti", r"rtx 5070 ti", 16, 88, 896, 64),
    Card("RTX 5070", r"rtx 5070", 12, 62, 672, 64),
    Card("RTX 5060 Ti 8GB", r"rtx 5060 ti 8gb", 8, 47, 448, 32),
    Card("RTX 5060 Ti", r"rtx 5060 ti", 16, 47, 448, 32),
    Card("RTX 4090", r"rtx 4090", 24, 165, 1008, 32),
    Card("RTX 4080 SUPER", r"rtx 4080 super", 16, 104, 736, 32),
    Card("RTX 4080", r"rtx 4080", 16, 97, 717, 32),
    Card("RTX 4070 Ti SUPER", r"rtx 4070 ti super", 16, 88, 672, 32),
    Card("RTX 4070 Ti", r"rtx 4070 ti", 12, 80, 504, 32),
    Card("RTX 4070 SUPER", r"rtx 4070 super", 12, 71, 504, 32),
    Card("RTX 4070", r"rtx 4070", 12, 58, 504, 32),
    Card("RTX 4060 Ti 16GB", r"rtx 4060 ti 16gb", 16, 44, 288, 16),
    Card("RTX 4060 Ti", r"rtx 4060 ti", 8, 44, 288, 16),
    Card("RTX 4060", r"rtx 4060", 8, 30, 272, 16),
    Card("RTX 3090", r"rtx 3090", 24, 71, 936, 32, fp8=False),
    Card("RTX 3080 Ti", r"rtx 3080 ti", 12, 68, 912, 32, fp8=False),
    Card("RTX 3080", r"rtx 3080", 10, 60, 760, 32, fp8=False),
    Card("RTX 3070 Ti", r"rtx 3070 ti", 8, 44, 608, 32, fp8=False),
    Card("RTX 3070", r"rtx 3070", 8, 41, 448, 32, fp8=False),
    Card("RTX 3060 Ti", r"rtx 3060 ti", 8, 32, 448, 32, fp8=False),
    Card("RTX 3060", r"rtx 3060", 12, 25, 360, 32, fp8=False),
    Card("V100-SXM2-32GB", r"v100.*sxm.*32gb", 32, 125, 900, 16, 150, bfloat16=False, fp8=False),
    Card("V100-SXM2-16GB", r"v100.*sxm\d", 16, 125, 900, 16, 150, bfloat16=False, fp8=False),
    Card("V100-PCIE-16GB", r"v100", 16, 112, 900, 16, bfloat16=False, fp8=False),
    Card("T4", r"t4", 16, 65, 320, 16, bfloat16=False, fp8=False),
    Card("RTX 2080 Ti", r"2080 ti", 11, 54, 616, 16, bfloat16=False, fp8=False),
)
_SMALLER = re.compile(r"\b(?:laptop|notebook|mobile|max q design)\b")
"""Marks a laptop card, which has fewer units, less memory and less power than the desktop card of that name."""
TABLE = "table"
"""Prefix of the source of rates that were not measured."""
_USUAL = (
    (12, "RTX 2080 Ti"), (17, "T4"), (26, "RTX 4090"), (34, "RTX 5090"), (44, "A100-SXM4-40GB"), (52, "RTX A6000"),
    (85, "A100-SXM4-80GB"), (100, "H100 NVL"), (150, "H200"),
)  # fmt: skip
"""(GiB, card) that an unnamed GPU of up to this memory is taken for."""


def rates_of(name: str) -> Rates | None:
    """The rates of a card as NVML prints its name, such as 'NVIDIA H100 80GB HBM3'; None for an unknown one."""
    card = _card(name)
    return _rates(card, name) if card else None


def rates_for(cluster: Cluster) -> tuple[Rates | None, tuple[str, ...]]:
    """What a plan calculates with, and what to say of it: measured, of the slowest card in the table, or a guess.

    None for CPU ranks, whose speed is not predicted.
    """
    if cluster.device == "cpu":
        return None, ()
    if cluster.rates is not None and not cluster.rates.source.startswith(TABLE):
        return cluster.rates, ()
    known = [rates for gpu in cluster.kinds if (rates := rates_of(gpu.name)) is not None]
    if len(known) == len(cluster.kinds):
        slowest = least(sorted(known, key=lambda rates: rates.matmul_flops_s))
        return slowest, (f"speed is predicted from the {slowest.source}; qdist doctor --gpus measures it",)
    card = usual_card(min(gpu.total_bytes for gpu in cluster.gpus))
    unknown = next(gpu.name for gpu in cluster.kinds if rates_of(gpu.name) is None)
    why = "no card was named" if unknown == UNNAMED else f"nothing is known of {unknown}"
    return rates_of(card), (f"{why}: speed is predicted as of the {card}",)


def memory_of(name: str, *, typed: str | None = None) -> int:
    """Bytes of a known card. Raises SpecError for another. typed: where its name stands among those of other cards."""
    card = _card(name)
    if card is None:
        whole = typed if typed and name else name
        ways = [{"gpu_name": whole.replace(name, title)} for title in _nearest(name)]
        raise SpecError(f"no card is known as {name!r}", ways=ways)
    return card.gib * GIB


def has_bfloat16(name: str) -> bool:
    """Whether a card multiplies in bfloat16; an unknown one is assumed to."""
    card = _card(name)
    return card is None or card.bfloat16


def has_fp8(gpu: Gpu) -> bool:
    """Whether a GPU multiplies in fp8: by its compute capability, or its card's name; an unknown one is assumed to."""
    if gpu.capability is not None:
        return gpu.capability >= FP8_CAPABILITY
    card = _card(gpu.name)
    return card is None or card.fp8


def usual_card(memory_bytes: int) -> str:
    """A common card with that much memory."""
    return next((name for gib, name in _USUAL if memory_bytes <= gib * GIB), "B200")


def _nearest(name: str) -> list[str]:
    """Up to three titles similar to a name, the most similar first; common ones if none is."""
    squeezed = {re.sub(r"\W", "", title).lower(): title for title in (card.title for card in CARDS)}
    wanted = re.sub(r"[\W_]|nvidia|geforce", "", name.lower())
    close = [title for key, title in squeezed.items() if wanted and (wanted in key or key in wanted)]
    close = close or [squeezed[key] for key in get_close_matches(wanted, squeezed, n=3, cutoff=0.5)]
    return close[:3] or ["RTX 4090", "A100-SXM4-80GB", "H100"]


def _card(name: str) -> Card | None:
    folded = re.sub(r"[\s_-]+", " ", name.lower())
    folded = re.sub(r"\b(rtx|geforce|nvidia|tesla)(?=\w*\d)", r"\1 ", re.sub(r"(?<=\d)ti\b", " ti", folded))
    if _SMALLER.search(folded):
        return None
    return next((card for card in CARDS if re.search(rf"\b(?:{card.name})\b", folded)), None)


def _rates(card: Card, name: str) -> Rates:
    link = card.nvlink_gb_s * NVLINK_SHARE or card.pcie_gb_s * PCIE_LINK_SHARE
    return Rates(
        matmul_flops_s=card.tflops * 1e12 * MATMUL_SHARE,
        memory_bytes_s=card.memory_gb_s * 1e9 * MEMORY_SHARE,
        link_bytes_s=link * 1e9,
        host_bytes_s=card.pcie_gb_s * 1e9 * HOST_SHARE,
        source=f"{TABLE}: {name.removeprefix('NVIDIA ')}",
    )


def described(
    *, gpus: int | None, gpu_name: str | None, gpu_memory: str | None, host_memory_bytes: int | None = None
) -> Cluster:
    """The machine to plan for: as many GPUs as are asked for of one card, or each GPU of a machine of several cards.

    gpu_name, gpu_memory: of every card, or of each: 'RTX 3090 + RTX 4090', '2 x 24GiB + 48GiB'. Memory is that of the
    named cards unless told.

    Raises SpecError for unknown cards, for what is not an amount of memory, and where names and amounts differ in
    number.
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
    for part in re.split(r"[+,]", text):
        match = re.fullmatch(r"\s*(\d{1,9})\s*x\s*(.+)", part, re.IGNORECASE)
        count, own = (int(match[1]), match[2]) if match else (1, part)
        if not 1 <= count <= MOST_RANKS - len(found):
            raise SpecError(
                f"{text!r} are {'no' if count < 1 else 'too many'} cards: a machine to plan for has 1 to {MOST_RANKS}",
                ways=[{flag: own.strip()}],
            )
        found += [own.strip()] * count
    return tuple(found)
