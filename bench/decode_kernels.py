"""Kernels of a decoding step, at the shapes of a 7B Llama with adapters r=64: `python bench/decode_kernels.py`.

Every time is that of a CUDA graph of 20 linears with weights of their own, so that no cache holds them, divided by 20.
The last column is 32 layers of them. Errors are against the product in float32 with weights in float32.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional

from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.runtime.kernels import four_bit, gptq
from qdist.runtime.kernels.decode_attention import torch_attention, triton_attention, triton_write
from qdist.runtime.kernels.fp8 import FourBit
from qdist.runtime.kernels.small_product import (
    Gptq,
    Member,
    StackedAdapter,
    Tiles,
    matrix_of,
    torch_products,
    triton_products,
)

GROUPS = {"q,k,v": ((4096,) * 3, 4096), "o": ((4096,), 4096), "gate,up": ((11008,) * 2, 4096), "down": ((4096,), 11008)}
"""Outputs of linears that read the same inputs, and these inputs."""
RANK, GROUP_SIZE = 64, 128
Layer = tuple[list[Member], StackedAdapter]
Product = Callable[[torch.Tensor, list[Member], StackedAdapter], Sequence[torch.Tensor]]


def main() -> None:
    """Print a line for each way and number of tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64")
    given = parser.parse_args()
    numbers = [int(number) for number in given.tokens.split(",")]
    torch.cuda.init()
    device = torch.device("cuda", 0)
    groups = {
        kind: {name: [layer(kind, *shape, device) for _ in range(given.layers)] for name, shape in GROUPS.items()}
        for kind in ("nf4", "gptq")
    }
    print(torch.cuda.get_device_name(device), torch.__version__)
    print(f"{'microseconds':34}" + "".join(f"{name:>9}" for name in GROUPS) + f"{'GB/s':>7}{'ms/token':>9}{'error':>9}")
    for tokens in numbers:
        for name, kind, product in ways(tokens):
            print(row(f"{tokens:3} {name}", groups[kind], tokens, product, errors="ours" in name), flush=True)
    for kind, tokens, tiles in swept():
        name = f"{tokens:3} {kind} {tuple(tiles)}"
        product = partial(without_adapter, tiles=tiles)
        print(row(name, groups[kind], tokens, product, errors=False), flush=True)
    for positions in (320, 4096):
        for rows in (1, 32):
            print(attention_row(positions, rows, given.layers, device), flush=True)


def ways(tokens: int) -> list[tuple[str, str, Product]]:
    """Ways to multiply, by the packing that they read."""
    found: list[tuple[str, str, Product]] = [
        ("nf4 ours", "nf4", without_adapter),
        ("nf4 ours + LoRA", "nf4", triton_products),
        ("gptq ours", "gptq", without_adapter),
        ("gptq ours + LoRA", "gptq", triton_products),
    ]
    if tokens in (1, 4, 16, 32, 64):
        found += [("nf4 bitsandbytes", "nf4", bitsandbytes), ("nf4 bitsandbytes + LoRA", "nf4", bitsandbytes_lora)]
        found += [("nf4 unpacked, cuBLAS + LoRA", "nf4", torch_products)]
    if tokens <= 4:
        found += [("gptq as it was", "gptq", gptq_before)]
    return found


def swept() -> list[tuple[str, int, Tiles]]:
    """Divisions to compare, without adapters."""
    vector = [
        (4, 64, 1, 4, 1),
        (8, 64, 1, 8, 1),
        (16, 32, 1, 4, 1),
        (8, 32, 2, 4, 1),
        (4, 32, 1, 2, 1),
        (8, 32, 1, 4, 2),
    ]
    dots = [
        (64, 1, 4, 4, 3),
        (64, 1, 8, 4, 3),
        (128, 1, 8, 4, 3),
        (64, 1, 8, 4, 6),
        (32, 1, 8, 2, 4),
        (64, 1, 16, 4, 4),
    ]
    words = [(128, 16, 8, 4, 2), (128, 16, 4, 4, 3), (64, 16, 8, 4, 2), (256, 16, 8, 4, 2), (128, 16, 8, 4, 1)]
    word_dots = [(64, 16, 4, 4, 2), (64, 16, 8, 4, 3), (128, 16, 8, 4, 3), (64, 8, 8, 4, 3), (32, 16, 8, 4, 3)]
    return [
        *(("nf4", 1, Tiles(*sizes)) for sizes in vector),
        *(("nf4", 16, Tiles(*sizes)) for sizes in dots),
        *(("gptq", 1, Tiles(*sizes)) for sizes in words),
        *(("gptq", 16, Tiles(*sizes)) for sizes in word_dots),
    ]


def layer(kind: str, outputs: tuple[int, ...], width: int, device: torch.device) -> Layer:
    """Random linears that read the same inputs, with an adapter."""
    members = [
        Member(random_nf4(size, width, device) if kind == "nf4" else random_gptq(size, width, device))
        for size in outputs
    ]
    down = torch.randn(RANK * len(outputs), width, device=device, dtype=torch.bfloat16) / 64
    ups = tuple(torch.randn(size, RANK, device=device, dtype=torch.bfloat16) / 64 for size in outputs)
    return members, StackedAdapter(down, ups, None)


def random_nf4(outputs: int, width: int, device: torch.device) -> FourBit:
    """Random bytes with absmaxes about 0.05."""
    blocks = outputs * width // BLOCK
    packed = torch.randint(256, (outputs * width // 2, 1), device=device, dtype=torch.uint8)
    absmax = torch.randint(256, (blocks,), device=device, dtype=torch.uint8)
    nested = torch.rand(-(-blocks // NESTED_BLOCK), device=device) * 0.02 + 0.01
    return FourBit(packed, absmax, (nested, torch.full((1,), 0.05, device=device)), "nf4", (outputs, width))


def random_gptq(outputs: int, width: int, device: torch.device) -> Gptq:
    """Random words, with zeros in the middle."""
    words = torch.empty(width // 8, outputs, device=device, dtype=torch.int32).random_(-(1 << 31), 1 << 31)
    groups = width // GROUP_SIZE
    zeros = torch.full((groups, outputs // 8), 0x77777777, device=device, dtype=torch.int32)
    scales = (torch.rand(groups, outputs, device=device) * 0.004 + 0.002).half()
    return Gptq(words, zeros, scales, None, 4, 1, GROUP_SIZE)


def without_adapter(
    inputs: torch.Tensor, members: list[Member], adapter: StackedAdapter, *, tiles: Tiles | None = None
) -> list[torch.Tensor]:
    """Ours, of the frozen linears alone."""
    return triton_products(inputs, members, None, tiles=tiles)


def bitsandbytes(inputs: torch.Tensor, members: list[Member], adapter: StackedAdapter) -> list[torch.Tensor]:
    """The library's kernel, one linear after the other."""
    book = four_bit.absmax_code_book(inputs.device)
    return [
        torch.ops.bitsandbytes.gemm_4bit(
            inputs, weight.packed, weight.shape, weight.nested[0], BLOCK, "nf4", bias=None, absmax_8bit=weight.absmax,
            absmax_code=book, absmax_offset=weight.nested[1],
        )
        for weight, _ in members
    ]  # fmt: skip


def bitsandbytes_lora(inputs: torch.Tensor, members: list[Member], adapter: StackedAdapter) -> list[torch.Tensor]:
    """The library's kernel, and cuBLAS for the adapter."""
    products, narrow = bitsandbytes(inputs, members, adapter), functional.linear(inputs, adapter.down)
    for index, (product, up) in enumerate(zip(products, adapter.ups, strict=True)):
        product.addmm_(narrow[:, index * RANK : (index + 1) * RANK], up.t())
    return products


def gptq_before(inputs: torch.Tensor, members: list[Member], adapter: StackedAdapter) -> list[torch.Tensor]:
    """The kernel that reads the weights once for each token."""
    stated = {"bits": 4, "offset": 1, "group_size": GROUP_SIZE}
    return [gptq.triton_product(inputs, *weight[:3], None, **stated) for weight, _ in members]


def row(name: str, groups: dict[str, list[Layer]], tokens: int, product: Product, *, errors: bool) -> str:
    """Microseconds of each group of linears, GB/s of packed weights, a token's time and the error."""
    times, worst = [], 0.0
    for layers in groups.values():
        width = layers[0][1].down.shape[1]
        inputs = torch.randn(tokens, width, device=layers[0][1].down.device, dtype=torch.bfloat16)
        times.append(microseconds([partial(product, inputs, *parts) for parts in layers]))
        if errors:
            found = product(inputs, *layers[0])
            adapter = layers[0][1] if "LoRA" in name else None
            worst = max(worst, error(inputs, layers[0][0], adapter, found))
    weights = sum(sum(outputs) * width for outputs, width in GROUPS.values())
    total = sum(times)
    cells = "".join(f"{time:9.1f}" for time in times)
    return f"{name:34}{cells}{weights / 2 / total / 1e3:7.0f}{total * 32 / 1e3:9.3f}" + (
        f"{worst:9.1e}" if errors else ""
    )


def error(
    inputs: torch.Tensor, members: list[Member], adapter: StackedAdapter | None, found: Sequence[torch.Tensor]
) -> float:
    """The largest relative error of a member's product."""
    begin, worst = 0, 0.0
    for index, member in enumerate(members):
        wanted = inputs.float() @ matrix_of(member.weight, torch.float32).t()
        if adapter is not None:
            up = adapter.ups[index].float()
            wanted += inputs.float() @ adapter.down[begin : begin + RANK].float().t() @ up.t()
            begin += RANK
        worst = max(worst, float((found[index].float() - wanted).norm() / wanted.norm()))
    return worst


def microseconds(works: Sequence[Callable[[], object]]) -> float:
    """Of one of the works, captured in one graph; the least of five replays."""
    works[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times[1:]) * 1e3 / len(works)


def attention_row(positions: int, rows: int, layers: int, device: torch.device) -> str:
    """Writing a token and attending to all, of 32 heads of 128, beside torch's attention over the same keys."""
    layers = min(layers, max(2, 160 // rows * 320 // positions))
    shape = (rows, 32, positions, 128)
    layout = {"device": device, "dtype": torch.bfloat16}
    caches = [(torch.randn(shape, **layout), torch.randn(shape, **layout)) for _ in range(layers)]
    query, key, value = (torch.randn(rows, 32, 1, 128, **layout) for _ in range(3))
    lengths = torch.full((rows,), positions, device=device)
    ours = microseconds([partial(triton_attention, query, *cache, lengths, 128**-0.5) for cache in caches])
    write = microseconds([partial(triton_write, key, value, *cache, lengths - 1) for cache in caches])
    stock = microseconds([partial(functional.scaled_dot_product_attention, query, *cache) for cache in caches])
    wanted = torch_attention(query, *caches[0], lengths, 128**-0.5).float()
    found = triton_attention(query, *caches[0], lengths, 128**-0.5).float()
    worst = float((found - wanted).norm() / wanted.norm())
    rate = 2 * caches[0][0].numel() * 2 / ours / 1e3
    attend = partial(triton_attention, query)
    times = {
        count: microseconds([partial(attend, *cache, lengths, 128**-0.5, splits=count) for cache in caches])
        for count in (1, 2, 4, 8, 16)
    }
    splits = " ".join(f"{count}: {time:.1f}" for count, time in times.items())
    return (
        f"attention {positions} x {rows}: {ours:.1f} us, {rate:.0f} GB/s, error {worst:.1e}; write {write:.1f}; "
        f"torch {stock:.1f}; by splits {splits}"
    )


if __name__ == "__main__":
    main()
