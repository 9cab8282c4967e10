import pytest
import torch

from qdist.core.model.storage import BLOCK
from qdist.runtime.kernels import four_bit, gptq_bits
from qdist.runtime.kernels.small_product import (
    MOST_TOKENS,
    Gptq,
    Member,
    StackedAdapter,
    choose_tiles,
    has_kernel,
    small_products,
    table_words,
)
from tests.runtime.kernels import packed_members as packed

NF4 = packed.four_bits(24, 128, "nf4", nested=True)
FP4 = packed.four_bits(24, 128, "fp4", nested=False)
GPTQ = packed.gptq(24, 128, 64)


def test_members_of_every_packing_are_multiplied_as_their_unpacked_weights() -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    inputs, bias = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)), torch.arange(24.0)
    state = QuantState(
        FP4.absmax, torch.Size((24, 128)), torch.float32, blocksize=64, quant_type="fp4", dtype=torch.float32
    )
    groups = gptq_bits.group_of_inputs(128, 64, torch.device("cpu"))
    matrices = [
        dequantize_4bit(FP4.packed, state),
        gptq_bits.dequantize(*GPTQ[:3], groups, bits=4, offset=1, dtype=torch.float32).t(),
        torch.ones(8, 128),
    ]
    members = [Member(FP4, bias), Member(GPTQ), Member(torch.ones(8, 128))]
    found = small_products(inputs, members, None)
    assert torch.allclose(found[0], inputs @ matrices[0].t() + bias, atol=1e-5)
    for product, matrix in zip(found[1:], matrices[1:], strict=True):
        assert torch.allclose(product, inputs @ matrix.t(), atol=1e-4)


def test_each_token_gets_the_ranks_that_its_mask_names() -> None:
    inputs = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]])
    down = torch.tensor([[2.0, 0, 0], [3, 0, 0], [5, 0, 0]])
    ups = (torch.tensor([[1.0, 10.0]]), torch.zeros(1, 0), torch.tensor([[7.0]]))
    mask = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 1], [9, 9, 9]])
    frozen = [Member(torch.tensor([[1.0, 0, 0]]))] * 3
    found = small_products(inputs, frozen, StackedAdapter(down, ups, mask))
    assert [product.flatten().tolist() for product in found] == [[1.0, 3.0, 31.0], [1.0, 1.0, 1.0], [1.0, 1.0, 36.0]]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([NF4], True),
        ([NF4, NF4, NF4], True),
        ([NF4] * 4, False),
        ([NF4, FP4], False),
        ([NF4, GPTQ], False),
        ([packed.four_bits(8, 96, "nf4", nested=False)], False),
        ([GPTQ, GPTQ], True),
        ([GPTQ, packed.gptq(24, 128, -1)], False),
        ([packed.gptq(24, 128, 64, bits=8)], False),
        ([packed.gptq(24, 128, 16)], False),
        ([GPTQ._replace(groups=torch.zeros(128, dtype=torch.int32))], False),
        ([torch.ones(2, 2)], False),
    ],
)
def test_kernels_take_linears_of_one_packing_in_whole_blocks(weights: list[object], wanted: bool) -> None:
    assert has_kernel([Member(weight) for weight in weights]) is wanted


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_of_the_table_hold_the_bytes_of_the_code_book(kind: str, dtype: torch.dtype) -> None:
    planes = [b"".join(word.to_bytes(4, "little", signed=True) for word in words) for words in halves(kind, dtype)]
    bits = [low + 256 * high for low, high in zip(*planes, strict=True)]
    values = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(values, four_bit.code_book(kind, torch.device("cpu")).to(dtype))


def halves(kind: str, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    words = table_words(kind, dtype)
    return words[:4], words[4:]


@pytest.mark.parametrize("outputs", [8, 576, 4096, 12288, 151936])
@pytest.mark.parametrize("width", [64, 576, 4096, 11008])
@pytest.mark.parametrize("tokens", [1, 2, 16, MOST_TOKENS])
def test_a_launch_is_divided_into_powers_of_two_and_no_split_is_empty(outputs: int, width: int, tokens: int) -> None:
    for weight, unit in ((NF4._replace(shape=(outputs, width)), BLOCK), (wide_gptq(outputs), 8)):
        tiles = choose_tiles([Member(weight)], tokens, width)
        assert all(count & (count - 1) == 0 for count in (tiles.rows, tiles.depth, tiles.warps))
        steps = -(-width // (unit * tiles.depth))
        assert tiles.splits == 1 or (tiles.splits - 1) * -(-steps // tiles.splits) < steps


def wide_gptq(outputs: int) -> Gptq:
    return GPTQ._replace(qweight=torch.empty(1, outputs, device="meta"))
