"""Compiles every Triton kernel for a card that is not there: `python bench/compile_kernels.py` (`pip install triton`).

The kernels' own launchers are called with tensors without storage, so that types, tiles and warps are those in use, and
what they would launch is compiled to machine code instead. Triton's interpreter, which runs kernels on a CPU, checks no
types. Exits with 1 if a kernel does not compile.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from fp8 import scaled_sums
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.errors import CompilationError
from triton.runtime import JITFunction, driver
from triton.runtime.errors import PTXASError

from qdist.core.model.gptq import Shape
from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.runtime.kernels import (
    cross_entropy,
    decode_attention,
    dropout,
    four_bit,
    fp8,
    gptq,
    gptq_solve,
    mxfp4,
    pooling,
    small_product,
    sums,
)

HALVES, BOTH = (torch.bfloat16, torch.float16), (False, True)
FLOATS = (*HALVES, torch.float32)
TOKENS = 8192
MATRICES = ((4096, 11008), (144, 192))
"""Outputs and inputs, of a 7B Llama and of a small linear."""
Work = tuple[str, Callable[[], object]]


class Absent(DriverBase):
    """A card that is only compiled for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("only launching needs it")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs")


def main() -> None:
    """Print each launch that does not compile, and how many there are of each module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90, help="of the card, ten times: 90 for H100 and H200")
    given = parser.parse_args()
    driver.set_active(Absent(given.capability))
    modules = [of_four_bits, of_gptq, of_solving, of_dropout, of_cross_entropy, of_the_others]
    modules += [of_small_products, of_decode_attention]
    if given.capability >= 89:
        modules.append(of_fp8)
    failed = 0
    with patch.object(JITFunction, "__getitem__", lambda kernel, grid: partial(kernel.warmup, grid=grid)):
        for module in modules:
            works = list(module())
            bad = sum(not compiles(*work) for work in works)
            print(f"{module.__name__:18} {len(works):4} launches, {bad} do not compile", flush=True)
            failed += bad
    sys.exit(1 if failed else 0)


def compiles(name: str, launch: Callable[[], object]) -> bool:
    """Whether all that a launcher launches compiles; prints why not."""
    try:
        launch()
    except (CompilationError, PTXASError) as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        print(f"{name}:\n{error}\n{first}\n")
        return False
    return True


def absent(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has no storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def of_fp8() -> Iterator[Work]:
    """Conversions to fp8, and to what bench/fp8.py compares it with."""
    targets = ((torch.bfloat16, fp8.FP8), (torch.float16, fp8.FP8), (torch.bfloat16, torch.int8))
    for width, (dtype, target), scaled in product((64, 100, 4096, 22016), targets, BOTH):
        inputs, factors = absent(TOKENS, width, dtype=dtype), absent(width) if scaled else None
        work = partial(fp8.triton_quantize_tokens, inputs, factors, dtype=target)
        yield f"tokens {width} {dtype} to {target}, scaled {scaled}", work
    for (outputs, inputs), dtype, transposed in product(MATRICES, HALVES, BOTH):
        for matrix in (absent(outputs, inputs, dtype=dtype), absent(inputs, outputs, dtype=dtype).t()):
            work = partial(fp8.triton_convert, matrix, absent(outputs), transposed=transposed)
            yield f"matrix {dtype} {matrix.stride()} to fp8, transposed {transposed}", work
    for shape, nested, target, transposed in product(MATRICES, BOTH, (fp8.FP8, torch.int8, torch.float32), BOTH):
        weights = fp8.FourBit(*nf4(*shape, nested=nested), "nf4", shape)
        work = partial(fp8.triton_unpack, weights, absent(shape[0]), transposed=transposed, dtype=target)
        name = f"NF4 {shape} to {target}, nested {nested}"
        yield f"{name}, transposed {transposed}", work
        if not transposed:
            yield f"scales of {name}", partial(fp8.triton_row_scales, weights, dtype=target)
    yield "scaled sums", partial(scaled_sums, absent(64, 4096, dtype=torch.int32), absent(64), absent(4096))


def nf4(*shape: int, nested: bool) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Packed weights, absmaxes, and what those are packed with."""
    blocks = prod(shape) // BLOCK
    absmax = absent(blocks, dtype=torch.uint8 if nested else torch.float32)
    return absent(blocks * BLOCK // 2, dtype=torch.uint8), absmax, outer(blocks, 1) if nested else None


def outer(blocks: int, matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the absmaxes of blocks are packed with, for several matrices."""
    return absent(matrices, -(-blocks // matrices // NESTED_BLOCK)), absent(matrices)


def of_four_bits() -> Iterator[Work]:
    """Unpacking of NF4, FP4 and MXFP4, of linears and of experts."""
    for shape, dtype in product(((4096, 11008), (8, 2048, 768), (6, 64)), FLOATS):
        weights, absmax, _ = nf4(*shape, nested=True)
        nested = outer(absmax.numel(), shape[0] if len(shape) == 3 else 1)
        yield f"{shape} {dtype}", partial(four_bit._fused, weights, absmax, nested, "nf4", shape, dtype)
    for shape, dtype in product(((4096, 2880 // 32), (32, 3)), FLOATS):
        blocks, scales = absent(*shape, 16, dtype=torch.uint8), absent(*shape, dtype=torch.uint8)
        yield f"MXFP4 {shape} {dtype}", partial(mxfp4._fused, blocks, scales, dtype)


def of_gptq() -> Iterator[Work]:
    """Unpacking of GPTQ weights, and their products with a few tokens."""
    shapes = product(MATRICES, (2, 3, 4, 8), (32, 128, -1), BOTH)
    for (outputs, inputs), bits, group_size, ordered in shapes:
        if group_size == 128 and inputs % 128:
            continue
        sizes = Shape(bits, group_size).tensors(inputs, outputs)
        words, zeros = (absent(*sizes[name], dtype=torch.int32) for name in ("qweight", "qzeros"))
        groups = absent(inputs, dtype=torch.int32) if ordered else None
        stated = {"bits": bits, "offset": 1, "group_size": group_size}
        scales = absent(*sizes["scales"], dtype=torch.float16)
        for dtype in HALVES:
            name, tensors = f"{bits} bits, {group_size}, {ordered}, {dtype}", (words, zeros, scales, groups)
            yield f"unpack {name}", partial(gptq.triton_dequantize, *tensors, **stated, dtype=dtype)
            given = absent(4, inputs, dtype=dtype)
            yield f"multiply {name}", partial(gptq.triton_product, given, *tensors, **stated)


def of_solving() -> Iterator[Work]:
    """Making GPTQ weights."""
    for rows, outputs in ((128, 4096), (32, 100)):
        tensors = absent(rows, outputs), absent(rows, rows), absent(outputs), absent(outputs)
        yield f"round {rows, outputs}", partial(gptq_solve.triton_round_block, *tensors, top=15)
    for rows, bits, sym, lowest, search in product((128, 4096), (3, 4), BOTH, (0, 1), BOTH):
        work = partial(gptq_solve.triton_fit, absent(rows, 4096), absent(rows), bits, sym=sym, lowest_zero=lowest)
        yield f"fit {rows} {bits} {sym} {lowest} {search}", partial(work, search=search)


def of_dropout() -> Iterator[Work]:
    """Dropout, and thin products with it."""
    mask = dropout.Mask(absent(1, dtype=torch.int64), 77, 0.1)
    for width, dtype in product((4096, 100), FLOATS):
        inputs = absent(TOKENS, width, dtype=dtype)
        yield f"copy {width} {dtype}", partial(dropout.triton_dropped, inputs, mask)
        for rank in (8, 64, 192):
            down, narrow = absent(rank, width, dtype=dtype), absent(TOKENS, rank, dtype=dtype)
            name = f"{width} {dtype} {rank}"
            yield f"product {name}", partial(dropout.triton_product, inputs, down, mask)
            yield f"gradient {name}", partial(dropout.triton_gradient, narrow, inputs, mask)
            yield f"add {name}", partial(dropout.triton_add, inputs, narrow, down, mask, 0.5)


def of_cross_entropy() -> Iterator[Work]:
    """Losses of small, of usual and of capped vocabularies."""
    for vocabulary, dtype, after, softcap in product((32000, 49152, 100), FLOATS, (1.0, 0.5), (None, 30.0)):
        logits, wanted, losses = absent(64, vocabulary, dtype=dtype), absent(64, dtype=torch.int64), absent(64)
        work = partial(cross_entropy.losses_and_gradients, logits, wanted, losses, after=after, softcap=softcap)
        yield f"{vocabulary} {dtype} {after} {softcap}", work


def of_the_others() -> Iterator[Work]:
    """Pooling and checksums."""
    for pool, dtype in product((16, 32, 128), FLOATS):
        yield f"means {pool} {dtype}", partial(pooling.triton_means, absent(1024, 4096, dtype=dtype), pool)
    yield "sums", partial(sums.word_sums, absent(1 << 20, dtype=torch.int32))


def of_small_products() -> Iterator[Work]:
    """Products of few tokens with packed weights and adapters, as a decoding step has them."""
    shapes = (((4096, 4096, 4096), 4096), ((11008, 11008), 4096), ((4096,), 11008), ((576, 192, 192), 576))
    for (outputs, inputs), tokens, dtype in product(shapes, (1, 2, 16, 32, 64), FLOATS):
        masks = (None, absent(tokens, 64 * len(outputs), dtype=dtype))
        given, down = absent(tokens, inputs, dtype=dtype), absent(64 * len(outputs), inputs, dtype=dtype)
        ups = tuple(absent(size, 64, dtype=dtype) for size in outputs)
        for adapter in (None, *(small_product.StackedAdapter(down, ups, mask) for mask in masks)):
            for name, members in packed_members(outputs, inputs):
                work = partial(small_product.triton_products, given, members, adapter)
                yield f"{name} {outputs} {inputs} {tokens} {dtype} {adapter is not None}", work


def packed_members(outputs: tuple[int, ...], inputs: int) -> Iterator[tuple[str, list[small_product.Member]]]:
    """Linears that read the same inputs, in each packing."""
    for kind, nested in (("nf4", True), ("fp4", False)):
        packed = [fp8.FourBit(*nf4(size, inputs, nested=nested), kind, (size, inputs)) for size in outputs]
        yield f"{kind}, nested {nested}", [small_product.Member(weight) for weight in packed]
    for group_size in (32, 64, 128, -1):
        if inputs % group_size:
            continue
        members = []
        for size in outputs:
            sizes = Shape(4, group_size).tensors(inputs, size)
            words, zeros = (absent(*sizes[name], dtype=torch.int32) for name in ("qweight", "qzeros"))
            weight = small_product.Gptq(words, zeros, absent(*sizes["scales"]).half(), None, 4, 1, group_size)
            members.append(small_product.Member(weight, absent(size)))
        yield f"GPTQ {group_size}", members


def of_decode_attention() -> Iterator[Work]:
    """Attention of one token a row, and the writing of its key and value."""
    for (heads, shared, size), rows, dtype in product(
        ((32, 32, 128), (9, 3, 64), (8, 4, 256), (12, 1, 80)), (1, 32), FLOATS
    ):
        query, new = absent(rows, heads, 1, size, dtype=dtype), absent(rows, shared, 1, size, dtype=dtype)
        cache, lengths = absent(rows, shared, 4096, size, dtype=dtype), absent(rows, dtype=torch.int64)
        name = f"{heads, shared, size} {rows} {dtype}"
        yield f"write {name}", partial(decode_attention.triton_write, new, new, cache, cache, lengths)
        for window, sinks, softcap in ((0, None, None), (1024, absent(heads, dtype=dtype), 30.0)):
            attend = partial(decode_attention.triton_attention, query, cache, cache, lengths, 0.1, window)
            for splits in (None, 1):
                yield f"attend {name} {window}", partial(attend, sinks=sinks, softcap=softcap, splits=splits)


if __name__ == "__main__":
    main()
