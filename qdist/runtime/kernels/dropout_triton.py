"""The Triton kernels of `qdist.runtime.kernels.dropout`; import only if Triton is installed.

Matrices are row-major: inputs and total [tokens, width], down [rank, width], narrow [tokens, rank]. The hash is that of
`dropout.kept`.
"""

import triton
import triton.language as tl


@triton.jit
def mixed(value):  # type: ignore[no-untyped-def]
    """lowbias32 of int32."""
    value = (value ^ ((value >> 16) & 0xFFFF)) * 0x7FEB352D
    value = (value ^ ((value >> 15) & 0x1FFFF)) * -0x7B935975
    return value ^ ((value >> 16) & 0xFFFF)


@triton.jit
def keys_of(seed, constant):  # type: ignore[no-untyped-def]
    """Two int32 keys of a micro-batch and a linear."""
    number = tl.load(seed)
    first = mixed(mixed(number.to(tl.int32)) ^ constant)
    return first, mixed((number >> 32).to(tl.int32) ^ first)


@triton.jit
def kept(rows, columns, first, second, threshold):  # type: ignore[no-untyped-def]
    """Which elements of the tile rows x columns are kept."""
    value = mixed(mixed(rows ^ first) + second)[:, None] ^ mixed(mixed(columns ^ second) + first)[None, :]
    value = value * 0x7FEB352D
    value = (value ^ ((value >> 15) & 0x1FFFF)) * -0x7B935975
    return value < threshold


@triton.jit
def tile_of(matrix, rows, columns, height, width):  # type: ignore[no-untyped-def]
    """The tile rows x columns of a matrix [height, width], with zeros beyond its edges."""
    there = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=there, other=0.0)


@triton.jit
def kept_tile(inputs, rows, columns, height, width, first, second, threshold):  # type: ignore[no-untyped-def]
    """The same of inputs, with zeros where they are dropped."""
    values = tile_of(inputs, rows, columns, height, width)
    return tl.where(kept(rows, columns, first, second, threshold), values, tl.zeros_like(values))


@triton.jit(do_not_specialize=["constant", "threshold"])
def copy_kept(  # type: ignore[no-untyped-def]
    inputs, seed, out, tokens, width, constant, threshold, BM: tl.constexpr, BK: tl.constexpr
):
    """out = inputs, with zeros where they are dropped."""
    first, second = keys_of(seed, constant)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    values = kept_tile(inputs, rows, columns, tokens, width, first, second, threshold)
    there = (rows < tokens)[:, None] & (columns < width)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * width + columns[None, :], values, mask=there)


@triton.jit(do_not_specialize=["constant", "threshold"])
def product(  # type: ignore[no-untyped-def]
    inputs, down, seed, parts, tokens, width, rank, constant, threshold, EACH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [splits, tokens, rank]: the kept inputs times down', each split over EACH inputs."""
    first, second = keys_of(seed, constant)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * R + tl.arange(0, R)
    split = tl.program_id(2)
    total = tl.zeros((BM, R), dtype=tl.float32)
    for begin in range(0, EACH, BK):
        columns = split * EACH + begin + tl.arange(0, BK)
        values = kept_tile(inputs, rows, columns, tokens, width, first, second, threshold)
        matrix = tile_of(down, ranks, columns, rank, width)
        total = tl.dot(values, tl.trans(matrix), total, input_precision=PRECISION)
    there = (rows < tokens)[:, None] & (ranks < rank)[None, :]
    row = split.to(tl.int64) * tokens + rows
    tl.store(parts + row[:, None] * rank + ranks[None, :], total, mask=there)


@triton.jit(do_not_specialize=["constant", "threshold"])
def gradient(  # type: ignore[no-untyped-def]
    narrow, inputs, seed, parts, tokens, width, rank, constant, threshold, EACH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [splits, rank, width]: narrow' times the kept inputs, each split over EACH tokens."""
    first, second = keys_of(seed, constant)
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks = tl.program_id(1) * R + tl.arange(0, R)
    split = tl.program_id(2)
    total = tl.zeros((R, BK), dtype=tl.float32)
    for begin in range(0, EACH, BM):
        rows = split * EACH + begin + tl.arange(0, BM)
        values = kept_tile(inputs, rows, columns, tokens, width, first, second, threshold)
        gradients = tile_of(narrow, rows, ranks, tokens, rank)
        total = tl.dot(tl.trans(gradients), values, total, input_precision=PRECISION)
    there = (ranks < rank)[:, None] & (columns < width)[None, :]
    row = split.to(tl.int64) * rank + ranks
    tl.store(parts + row[:, None] * width + columns[None, :], total, mask=there)


@triton.jit(do_not_specialize=["alpha", "constant", "threshold"])
def add_kept(  # type: ignore[no-untyped-def]
    total, narrow, down, seed, tokens, width, alpha, constant, threshold, RANK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += alpha x narrow times down, where inputs are kept."""
    first, second = keys_of(seed, constant)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    added = tl.zeros((BM, BK), dtype=tl.float32)
    for begin in range(0, RANK, R):
        ranks = begin + tl.arange(0, R)
        gradients = tile_of(narrow, rows, ranks, tokens, RANK)
        added = tl.dot(gradients, tile_of(down, ranks, columns, RANK, width), added, input_precision=PRECISION)
    there = (rows < tokens)[:, None] & (columns < width)[None, :]
    place = total + rows.to(tl.int64)[:, None] * width + columns[None, :]
    before = tl.load(place, mask=there, other=0.0).to(tl.float32)
    added = tl.where(kept(rows, columns, first, second, threshold), added * alpha, 0.0)
    tl.store(place, (before + added).to(total.dtype.element_ty), mask=there)
