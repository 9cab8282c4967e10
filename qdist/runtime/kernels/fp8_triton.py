"""The Triton kernels of `qdist.runtime.kernels.fp8`; import only if Triton is installed.

Values are divided by their row's scale, so that none exceeds LARGEST, and stored in the type of their target.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value, target):  # type: ignore[no-untyped-def]
    """Values in the type of a pointer's target; integers are rounded, where a cast would cut them."""
    if target.dtype.element_ty == tl.int8:
        value = tl.floor(value + 0.5)
    return value.to(target.dtype.element_ty)


@triton.jit
def quantize_rows(  # type: ignore[no-untyped-def]
    inputs, factors, values, scale, width, FACTORS: tl.constexpr, LARGEST: tl.constexpr, WIDTH: tl.constexpr
):
    """A row [width] of each program, with its scale. With `factors` [width], multiplied by them first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < width
    value = tl.load(inputs + row * width + column, mask=there, other=0.0).to(tl.float32)
    if FACTORS:
        value *= tl.load(factors + column, mask=there, other=0.0)
    own = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
    tl.store(scale + row, own)
    tl.store(values + row * width + column, rounded(value / own, values), mask=there)


@triton.jit
def convert(  # type: ignore[no-untyped-def]
    matrix, scale, values, outputs, inputs, row_step, column_step, row_target, column_target, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix [outputs, inputs], each row divided by its scale. Source and target have any strides."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    there = (row < outputs)[:, None] & (column < inputs)[None, :]
    place = row[:, None] * row_step + column[None, :] * column_step
    value = tl.load(matrix + place, mask=there, other=0.0).to(tl.float32)
    own = tl.load(scale + row, mask=row < outputs, other=1.0)
    target = row[:, None] * row_target + column[None, :] * column_target
    tl.store(values + target, rounded(value / own[:, None], values), mask=there)


@triton.jit
def absmax_of(  # type: ignore[no-untyped-def]
    absmax, book, nested, offset, block, there, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):
    """The largest magnitudes of blocks, float32."""
    if NESTED:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        wide = tl.load(nested + block // NESTED_BLOCK, mask=there, other=0.0)
        largest = tl.load(book + code, mask=there, other=0.0) * wide + tl.load(offset)
    else:
        largest = tl.load(absmax + block, mask=there, other=0.0)
    return largest  # the only one: Triton types each return, also that of a branch not taken


@triton.jit
def row_scales(  # type: ignore[no-untyped-def]
    absmax, book, nested, offset, scale, outputs, blocks, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The scales of ROWS rows of `blocks` blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCKS)
    there = (row < outputs)[:, None] & (column < blocks)[None, :]
    block = row.to(tl.int64)[:, None] * blocks + column[None, :]
    found = absmax_of(absmax, book, nested, offset, block, there, NESTED, NESTED_BLOCK)
    largest = tl.max(tl.where(there, tl.abs(found), 0.0), 1)
    tl.store(scale + row, tl.maximum(largest, 1e-12) / LARGEST, mask=row < outputs)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    packed, absmax, scale_book, nested, offset, book, scale, values, outputs, blocks, row_target, column_target,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of each of ROWS rows, divided by the rows' scales. The target has any strides: a transpose too."""
    HALF: tl.constexpr = BLOCK // 2
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < outputs
    block = row * blocks + tl.program_id(1)
    largest = absmax_of(absmax, scale_book, nested, offset, block, there, NESTED, NESTED_BLOCK)
    factor = largest / tl.load(scale + row, mask=there, other=1.0)
    place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + place, mask=there[:, None], other=0).to(tl.int32)
    value = tl.interleave(tl.load(book + (pair >> 4)), tl.load(book + (pair & 15))) * factor[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    target = row[:, None] * row_target + column[None, :] * column_target
    tl.store(values + target, rounded(value, values), mask=there[:, None])
