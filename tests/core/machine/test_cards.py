"""Does a card's name, as NVML prints it, give its rates?"""

import shlex

import pytest

from qdist.core.errors import SpecError
from qdist.core.machine.cards import CARDS, has_bfloat16, has_fp8, memory_of, rates_of, usual_card
from qdist.core.machine.cluster import Gpu
from qdist.core.text import GIB

NAMES = [
    # NVML's name -> 16-bit TFLOP/s and GB/s of memory on the data sheet, and whether it has NVLink
    ("NVIDIA H200", 989, 4800, True),
    ("NVIDIA H200 NVL", 835, 4800, True),
    ("NVIDIA GH200 480GB", 989, 4800, True),
    ("NVIDIA B200", 2250, 8000, True),
    ("NVIDIA H100 80GB HBM3", 989, 3350, True),
    ("NVIDIA H100 PCIe", 756, 2039, False),
    ("NVIDIA H100 NVL", 835, 3900, True),
    ("NVIDIA A100-SXM4-80GB", 312, 2039, True),
    ("NVIDIA A100-SXM4-40GB", 312, 1555, True),
    ("NVIDIA A100 80GB PCIe", 312, 1935, False),
    ("NVIDIA A100-PCIE-40GB", 312, 1555, False),
    ("NVIDIA L40S", 362, 864, False),
    ("NVIDIA L4", 121, 300, False),
    ("NVIDIA A10", 125, 600, False),
    ("NVIDIA A10G", 70, 600, False),
    ("NVIDIA A40", 150, 696, False),
    ("NVIDIA RTX A6000", 155, 768, False),
    ("NVIDIA RTX 6000 Ada Generation", 364, 960, False),
    ("NVIDIA GeForce RTX 3090", 71, 936, False),
    ("NVIDIA GeForce RTX 4090", 165, 1008, False),
    ("NVIDIA GeForce RTX 5090", 209, 1792, False),
    ("NVIDIA B300 SXM6 AC", 2250, 8000, True),
    ("NVIDIA GB300", 2250, 8000, True),
    ("NVIDIA GB10", 125, 273, False),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504, 1792, False),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 504, 1792, False),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 439, 1792, False),
    ("NVIDIA RTX PRO 5000 Blackwell", 258, 1344, False),
    ("NVIDIA RTX PRO 4000 Blackwell", 147, 672, False),
    ("NVIDIA RTX A5000", 111, 768, False),
    ("NVIDIA RTX A4500", 95, 640, False),
    ("NVIDIA RTX A4000", 77, 448, False),
    ("NVIDIA GeForce RTX 5080", 113, 960, False),
    ("NVIDIA GeForce RTX 5070 Ti", 88, 896, False),
    ("NVIDIA GeForce RTX 5070", 62, 672, False),
    ("NVIDIA GeForce RTX 5060 Ti", 47, 448, False),
    ("RTX 5060 Ti 8GB", 47, 448, False),
    ("NVIDIA GeForce RTX 4080 SUPER", 104, 736, False),
    ("NVIDIA GeForce RTX 4080", 97, 717, False),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 88, 672, False),
    ("NVIDIA GeForce RTX 4070 Ti", 80, 504, False),
    ("NVIDIA GeForce RTX 4070 SUPER", 71, 504, False),
    ("NVIDIA GeForce RTX 4070", 58, 504, False),
    ("NVIDIA GeForce RTX 4060 Ti", 44, 288, False),
    ("RTX 4060 Ti 16GB", 44, 288, False),
    ("NVIDIA GeForce RTX 4060", 30, 272, False),
    ("NVIDIA GeForce RTX 3080 Ti", 68, 912, False),
    ("NVIDIA GeForce RTX 3080", 60, 760, False),
    ("NVIDIA GeForce RTX 3070 Ti", 44, 608, False),
    ("NVIDIA GeForce RTX 3070", 41, 448, False),
    ("NVIDIA GeForce RTX 3060 Ti", 32, 448, False),
    ("NVIDIA GeForce RTX 3060", 25, 360, False),
    ("Tesla V100-SXM2-32GB", 125, 900, True),
    ("Tesla V100-SXM2-16GB", 125, 900, True),
    ("Tesla V100-PCIE-16GB", 112, 900, False),
    ("Tesla T4", 65, 320, False),
    ("NVIDIA GeForce RTX 2080 Ti", 54, 616, False),
]


@pytest.mark.parametrize(("name", "tflops", "memory", "nvlink"), NAMES)
def test_a_name_gives_the_rates_of_its_card(name: str, tflops: float, memory: float, nvlink: bool) -> None:
    rates = rates_of(name)
    assert rates is not None
    assert rates.matmul_flops_s == pytest.approx(0.68 * tflops * 1e12)
    assert rates.memory_bytes_s == pytest.approx(0.9 * memory * 1e9)
    assert (rates.link_bytes_s > 80e9) == nvlink
    assert rates.source.startswith("table: ")


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "", "hypothetical GPU", "Radeon Pro V1004", "A1000"])
def test_an_unknown_card_has_no_rates(name: str) -> None:
    assert rates_of(name) is None
    with pytest.raises(SpecError, match="no card is known"):
        memory_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4080 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX A5000 Laptop GPU",
        "NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU",
        "NVIDIA RTX 6000 Ada Generation Laptop GPU",
        "NVIDIA GeForce RTX 2080 Ti with Max-Q Design",
        "rtx4090-laptop",
    ],
)
def test_the_card_of_a_laptop_is_not_the_desktops_of_that_name(name: str) -> None:
    assert rates_of(name) is None
    with pytest.raises(SpecError, match="no card is known"):
        memory_of(name)


@pytest.mark.parametrize(
    "name", ["NVIDIA RTX 4000 SFF Ada Generation", "Quadro RTX 5000", "NVIDIA RTX A400", "NVIDIA GeForce RTX 5060"]
)
def test_a_card_that_is_not_in_the_table_is_not_taken_for_one_that_is(name: str) -> None:
    assert rates_of(name) is None


def test_each_card_in_the_table_can_be_reached() -> None:
    reached = {rates_of(name) for name, *_ in NAMES}
    assert len(reached) >= len(CARDS) - 1  # L40 alone is not among the names above


@pytest.mark.parametrize("gib", [8, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 400])
def test_every_size_of_memory_has_a_usual_card_in_the_table(gib: int) -> None:
    assert rates_of(usual_card(gib * GIB)) is not None
    assert memory_of(usual_card(gib * GIB)) >= gib * GIB * 0.9 or gib in (12, 96, 400)


def test_cards_before_ampere_have_no_bfloat16() -> None:
    without = {name for name, *_ in NAMES if not has_bfloat16(name)}
    assert all(word in name for name, word in zip(sorted(without), ("2080", "T4", "V100", "V100", "V100"), strict=True))
    assert has_bfloat16("Abacus 9")


@pytest.mark.parametrize("name", ["rtx4090", "RTX4090", "NVIDIA GeForce RTX4090", "rtx-4090", "geforce rtx 4090"])
def test_spaces_and_case_do_not_matter(name: str) -> None:
    assert rates_of(name).matmul_flops_s == rates_of("RTX 4090").matmul_flops_s  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "near"), [("4090", "RTX 4090"), ("h100sxm", "H100"), ("RTX 4900", "RTX 4090"), ("abacus", "RTX 4090")]
)
def test_an_unknown_name_lists_the_nearest(name: str, near: str) -> None:
    with pytest.raises(SpecError) as caught:
        memory_of(name)
    assert shlex.split(caught.value.try_) == ["--gpu-name", near]


def test_what_is_suggested_is_known() -> None:
    assert all(memory_of(card.title) == card.gib * GIB for card in CARDS)
    assert len({rates_of(card.title) for card in CARDS}) == len(CARDS)


def test_fp8_is_of_ada_hopper_and_newer_cards_and_the_driver_knows_best() -> None:
    def gpu(name: str, capability: tuple[int, int] | None = None) -> Gpu:
        return Gpu(index=0, name=name, total_bytes=GIB, free_bytes=GIB, capability=capability)

    assert [
        name for name in ("NVIDIA L4", "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe") if not has_fp8(gpu(name))
    ] == []
    assert [name for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA A10", "Tesla T4") if has_fp8(gpu(name))] == []
    assert has_fp8(gpu("Abacus 9"))
    assert not has_fp8(gpu("Abacus 9", (8, 6)))
    assert has_fp8(gpu("NVIDIA A10", (8, 9)))


def test_fp8_is_nearly_twice_as_fast_where_nobody_measured_it() -> None:
    h200 = rates_of("NVIDIA H200")
    assert h200
    assert 1.8 < h200.of_kernels.fp8_flops_s / h200.of_kernels.dense_flops_s < 2
