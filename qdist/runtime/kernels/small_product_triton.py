"""The Triton kernels of `qdist.runtime.kernels.small_product`; import only if Triton is installed.

A launch multiplies up to three members, linears that read the same inputs. Its programs are the members' tiles of
outputs, and splits of the inputs: each split writes float32 sums, and the program that is last to end adds them, in
the order of the splits, so that results do not depend on who that is. A total is [outputs of the tile, tokens].
"""

import triton
import triton.language as tl

from qdist.runtime.kernels.fp8_triton import absmax_of
from qdist.runtime.kernels.gptq_triton import zero_of

# Eight values of a word by byte permutations: a byte of each value from the 16 of a table in four registers, for four
# nibbles at once; bit 3 of a nibble chooses between the tables' halves. Then low and high bytes are interleaved.
DECODE = tl.constexpr(
    """
    {
    .reg .b32 s, t, a, b, l, h, p;
    and.b32 s, $8, 0x77777777;
    shr.u32 t, $8, 1;
    and.b32 t, t, 0x44444444;
    or.b32 t, t, 0x32103210;
    prmt.b32 a, $9, $10, s;
    prmt.b32 b, $11, $12, s;
    prmt.b32 l, a, b, t;
    prmt.b32 a, $13, $14, s;
    prmt.b32 b, $15, $16, s;
    prmt.b32 h, a, b, t;
    prmt.b32 p, l, h, 0x4051;
    mov.b32 {$0, $1}, p;
    prmt.b32 p, l, h, 0x6273;
    mov.b32 {$2, $3}, p;
    shr.u32 s, s, 16;
    shr.u32 t, t, 16;
    prmt.b32 a, $9, $10, s;
    prmt.b32 b, $11, $12, s;
    prmt.b32 l, a, b, t;
    prmt.b32 a, $13, $14, s;
    prmt.b32 b, $15, $16, s;
    prmt.b32 h, a, b, t;
    prmt.b32 p, l, h, 0x4051;
    mov.b32 {$4, $5}, p;
    prmt.b32 p, l, h, 0x6273;
    mov.b32 {$6, $7}, p;
    }
    """
)


@triton.jit
def pick(member, first, second, third):  # type: ignore[no-untyped-def]
    """What belongs to a member: a pointer or a number."""
    chosen = first
    if member == 1:
        chosen = second
    if member == 2:
        chosen = third
    return chosen


@triton.jit
def member_at(tile, outputs0, outputs1, outputs2, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(member, its outputs, its first output among all, first output of the tile within it)."""
    tiles0, tiles1 = tl.cdiv(outputs0, ROWS), tl.cdiv(outputs1, ROWS)
    member = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    outputs = pick(member, outputs0, outputs1, outputs2)
    before = pick(member, 0, outputs0, outputs0 + outputs1)
    tile -= pick(member, 0, tiles0, tiles0 + tiles1)
    return member, outputs, before, tile * ROWS


@triton.jit
def four_bit_values(  # type: ignore[no-untyped-def]
    words, low0, low1, low2, low3, high0, high1, high2, high3, book, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, WORDS], bytes of which hold two weights, as values [ROWS, 8 WORDS] without their absmax."""
    if PERMUTE:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            DECODE, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
            [words, low0, low1, low2, low3, high0, high1, high2, high3],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        even, odd = tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7))
        values = tl.reshape(tl.join(even, odd), (ROWS, 8 * WORDS)).to(DTYPE, bitcast=True)
    else:
        place = tl.arange(0, 8)
        shift = place // 2 * 8 + 4 - place % 2 * 4
        code = (words[:, :, None] >> shift[None, None, :]) & 15
        values = tl.load(book + tl.reshape(code, (ROWS, 8 * WORDS)))
    return values


@triton.jit
def add_adapter(  # type: ignore[no-untyped-def]
    total, row, there, token, tokens, narrow, mask, up, rank, column, all_ranks, DTYPE: tl.constexpr,
    THIN_SPLITS: tl.constexpr, MASKED: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Add a member's B times what `narrow` has of its A; columns of other adapters than a token's are masked."""
    for begin in range(0, rank, RANKS):
        inner = begin + tl.arange(0, RANKS)
        held = (token < tokens)[:, None] & (inner < rank)[None, :]
        place = token[:, None].to(tl.int64) * all_ranks + column + inner[None, :]
        sums = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for split in range(THIN_SPLITS):
            sums += tl.load(narrow + split * tokens * all_ranks + place, mask=held, other=0.0)
        if MASKED:
            sums *= tl.load(mask + place, mask=held, other=0.0).to(tl.float32)
        both = there[:, None] & (inner < rank)[None, :]
        upward = tl.load(up + row[:, None].to(tl.int64) * rank + inner[None, :], mask=both, other=0.0)
        if TOKENS == 1:
            total += tl.sum(upward.to(tl.float32) * sums, 1)[:, None]
        else:
            total += tl.dot(upward, tl.trans(sums.to(DTYPE)), input_precision="ieee")
    return total


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    total, row, there, outputs, before, all_outputs, tokens, tile, out, parts, counters, narrow, mask, up, rank,
    column, all_ranks, bias, SPLITS: tl.constexpr, THIN_SPLITS: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Add adapter and bias in the first split, then the splits, and store a tile of a member's outputs."""
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    if split == 0:
        if THIN_SPLITS > 0:
            total = add_adapter(
                total, row, there, token, tokens, narrow, mask, up, rank, column, all_ranks, out.dtype.element_ty,
                THIN_SPLITS, MASKED, TOKENS, RANKS,
            )  # fmt: skip
        if BIASED:
            total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[:, None]
    held = there[:, None] & (token < tokens)[None, :]
    # Members lie one behind the other, each [tokens, outputs].
    place = before.to(tl.int64) * tokens + token[None, :].to(tl.int64) * outputs + row[:, None]
    if SPLITS == 1:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=held)
    else:
        each = all_outputs.to(tl.int64) * tokens
        tl.store(parts + split * each + place, total, mask=held, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's sums are written before the program counts itself
        ended = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if ended == SPLITS - 1:
            total = tl.zeros_like(total)
            for index in range(SPLITS):
                total += tl.load(parts + index * each + place, mask=held, other=0.0, cache_modifier=".cg")
            tl.store(out + place, total.to(out.dtype.element_ty), mask=held)
            tl.store(counters + tile, 0)


@triton.jit(do_not_specialize=["tokens"])
def narrow_sums(  # type: ignore[no-untyped-def]
    inputs, down, narrow, tokens, width, all_ranks, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """narrow [SPLITS, tokens, all_ranks]: products of the inputs with A, each over a split of the inputs."""
    inner, token = tl.program_id(0) * RANKS + tl.arange(0, RANKS), tl.arange(0, TOKENS)
    split = tl.program_id(1)
    each = tl.cdiv(tl.cdiv(width, WIDTH), SPLITS) * WIDTH
    total = tl.zeros((RANKS, TOKENS), dtype=tl.float32)
    for begin in range(split * each, tl.minimum(width, (split + 1) * each), WIDTH):
        column = begin + tl.arange(0, WIDTH)
        held = (token < tokens)[:, None] & (column < width)[None, :]
        given = tl.load(inputs + token[:, None].to(tl.int64) * width + column[None, :], mask=held, other=0.0)
        held = (inner < all_ranks)[:, None] & (column < width)[None, :]
        matrix = tl.load(down + inner[:, None].to(tl.int64) * width + column[None, :], mask=held, other=0.0)
        total += tl.dot(matrix, tl.trans(given), input_precision="ieee")
    place = (split * tokens + token[None, :]).to(tl.int64) * all_ranks + inner[:, None]
    tl.store(narrow + place, total, mask=(inner < all_ranks)[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def four_bit_product(  # type: ignore[no-untyped-def]
    inputs, packed0, packed1, packed2, absmax0, absmax1, absmax2, nested0, nested1, nested2, offset0, offset1, offset2,
    up0, up1, up2, bias0, bias1, bias2, scale_book, book, low0, low1, low2, low3, high0, high1, high2, high3, narrow,
    mask, out, parts, counters, tokens, width, outputs0, outputs1, outputs2, rank0, rank1, rank2,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, SPLITS: tl.constexpr, THIN_SPLITS: tl.constexpr,
    MASKED: tl.constexpr, BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    RANKS: tl.constexpr, PERMUTE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Members of NF4 or FP4 in blocks of 64. With TOKENS 1 by multiplying and adding, BLOCKS blocks of a row at a time;
    else by tensor cores a block at a time, whose products are scaled: values would be rounded once more."""
    WORDS: tl.constexpr = 8 * BLOCKS
    tile, split = tl.program_id(0), tl.program_id(1)
    member, outputs, before, first = member_at(tile, outputs0, outputs1, outputs2, ROWS)
    packed, absmax = pick(member, packed0, packed1, packed2), pick(member, absmax0, absmax1, absmax2)
    nested, offset = pick(member, nested0, nested1, nested2), pick(member, offset0, offset1, offset2)
    row = first + tl.arange(0, ROWS)
    there = row < outputs
    blocks = width // 64
    each = tl.cdiv(tl.cdiv(blocks, BLOCKS), SPLITS) * BLOCKS
    token = tl.arange(0, TOKENS)
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    last = tl.minimum(blocks, (split + 1) * each)
    start = row[:, None].to(tl.int64) * blocks
    if TOKENS == 1:
        sums = tl.zeros((ROWS, BLOCKS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for begin in tl.range(split * each, last, BLOCKS, num_stages=STAGES):
        word, block = begin * 8 + tl.arange(0, WORDS), begin + tl.arange(0, BLOCKS)
        held = there[:, None] & (word < blocks * 8)[None, :]
        words = tl.load(packed + start * 8 + word[None, :], mask=held, other=0)
        values = four_bit_values(
            words, low0, low1, low2, low3, high0, high1, high2, high3, book, DTYPE, ROWS, WORDS, PERMUTE
        )
        held = there[:, None] & (block < blocks)[None, :]
        scale = absmax_of(absmax, scale_book, nested, offset, start + block[None, :], held, NESTED, NESTED_BLOCK)
        column = begin * 64 + tl.arange(0, 64 * BLOCKS)
        if TOKENS == 1:
            given = tl.load(inputs + column, mask=column < width, other=0.0).to(tl.float32)
            products = tl.reshape(values.to(tl.float32) * given[None, :], (ROWS, BLOCKS, 64))
            sums += tl.sum(products, 2) * scale
        else:
            tl.static_assert(BLOCKS == 1)
            held = (token < tokens)[:, None] & (column < width)[None, :]
            given = tl.load(inputs + token[:, None].to(tl.int64) * width + column[None, :], mask=held, other=0.0)
            total += tl.dot(values, tl.trans(given), input_precision="ieee") * scale
    if TOKENS == 1:
        total = tl.sum(sums, 1)[:, None]
    finish(
        total, row, there, outputs, before, outputs0 + outputs1 + outputs2, tokens, tile, out, parts, counters, narrow,
        mask, pick(member, up0, up1, up2), pick(member, rank0, rank1, rank2), pick(member, 0, rank0, rank0 + rank1),
        rank0 + rank1 + rank2, pick(member, bias0, bias1, bias2), SPLITS, THIN_SPLITS, MASKED, BIASED, TOKENS, RANKS,
    )  # fmt: skip


@triton.jit
def with_base(code, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """128 + code exactly, or 1024 + code in float16: the code is the last bits of the mantissa."""
    if KIND.primitive_bitwidth == 32:
        values = (code << 16 | 0x43000000).to(tl.float32, bitcast=True)
    elif KIND.is_fp16():
        values = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        values = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values


@triton.jit(do_not_specialize=["tokens"])
def gptq_product(  # type: ignore[no-untyped-def]
    inputs, packed0, packed1, packed2, zeros0, zeros1, zeros2, scales0, scales1, scales2, up0, up1, up2, bias0, bias1,
    bias2, narrow, mask, out, parts, counters, tokens, width, group_size, outputs0, outputs1, outputs2, rank0, rank1,
    rank2, OFFSET: tl.constexpr, SPLITS: tl.constexpr, THIN_SPLITS: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, RANKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Members of GPTQ, 4 bits, WORDS words of inputs at a time, which are of one group.

    Weights are bits under a constant exponent: BASE + weight, exactly. The sum is freed of the base and of the zero.
    """
    INPUTS: tl.constexpr = 8 * WORDS
    tile, split = tl.program_id(0), tl.program_id(1)
    member, outputs, before, first = member_at(tile, outputs0, outputs1, outputs2, ROWS)
    packed, qzeros = pick(member, packed0, packed1, packed2), pick(member, zeros0, zeros1, zeros2)
    scales = pick(member, scales0, scales1, scales2)
    row = first + tl.arange(0, ROWS)
    there = row < outputs
    each = tl.cdiv(tl.cdiv(width, INPUTS), SPLITS) * INPUTS
    token = tl.arange(0, TOKENS)
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    BASE: tl.constexpr = 1024 if inputs.dtype.element_ty == tl.float16 else 128
    if TOKENS == 1:
        sums = tl.zeros((WORDS, ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for begin in tl.range(split * each, tl.minimum(width, (split + 1) * each), INPUTS, num_stages=STAGES):
        word = begin // 8 + tl.arange(0, WORDS)
        held = (word < width // 8)[:, None] & there[None, :]
        words = tl.load(packed + word[:, None].to(tl.int64) * outputs + row[None, :], mask=held, other=0)
        group = begin // group_size
        zero = zero_of(qzeros, group, row, there, outputs // 8, 4) + OFFSET
        scale = tl.load(scales + group.to(tl.int64) * outputs + row, mask=there, other=0.0).to(tl.float32)
        if TOKENS == 1:
            within, all_given = tl.zeros((WORDS, ROWS), dtype=tl.float32), tl.zeros((WORDS,), dtype=tl.float32)
            for place in tl.static_range(8):
                given = tl.load(inputs + word * 8 + place, mask=word < width // 8, other=0.0).to(tl.float32)
                value = (((words >> (4 * place)) & 15) << 16 | 0x43000000).to(tl.float32, bitcast=True)
                within += value * given[:, None]
                all_given += given
            sums += (within - (zero + 128).to(tl.float32)[None, :] * all_given[:, None]) * scale[None, :]
        else:
            column = begin + tl.arange(0, INPUTS)
            held = (token < tokens)[:, None] & (column < width)[None, :]
            given = tl.load(inputs + token[:, None].to(tl.int64) * width + column[None, :], mask=held, other=0.0)
            code = (words[:, None, :] >> (tl.arange(0, 8) * 4)[None, :, None]) & 15
            code = tl.reshape(code, (INPUTS, ROWS))
            values = with_base(code, DTYPE)
            within = tl.dot(tl.trans(values), tl.trans(given), input_precision="ieee")
            all_given = tl.sum(given.to(tl.float32), 1)
            total += (within - (zero + BASE).to(tl.float32)[:, None] * all_given[None, :]) * scale[:, None]
    if TOKENS == 1:
        total = tl.sum(sums, 0)[:, None]
    finish(
        total, row, there, outputs, before, outputs0 + outputs1 + outputs2, tokens, tile, out, parts, counters, narrow,
        mask, pick(member, up0, up1, up2), pick(member, rank0, rank1, rank2), pick(member, 0, rank0, rank0 + rank1),
        rank0 + rank1 + rank2, pick(member, bias0, bias1, bias2), SPLITS, THIN_SPLITS, MASKED, BIASED, TOKENS, RANKS,
    )  # fmt: skip
