"""The Triton kernels of `qdist.runtime.kernels.gptq`; import only if Triton is installed.

A period is the values of one word, or the 32 values of 3 bits in three words. Words are int32, so a shift to the right
copies the sign; masks take it off.
"""

import triton
import triton.language as tl


@triton.jit
def zero_of(qzeros, group, column, there, zero_words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The stored zeros of `column` in `group`, which may straddle words at 3 bits."""
    bit = column * BITS
    place, shift = group * zero_words + bit // 32, bit % 32
    value = tl.load(qzeros + place, mask=there, other=0) >> shift
    if BITS == 3:
        over = there & (shift > 29)
        after = tl.load(qzeros + place + 1, mask=over, other=0)
        low = 32 - shift
        value = tl.where(over, (value & ((1 << low) - 1)) | (after << low), value)
    return value & ((1 << BITS) - 1)


@triton.jit
def words_of(qweight, row, column, there, outputs, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of a period: three, which differ only at 3 bits."""
    at = qweight + row.to(tl.int64) * WORDS * outputs + column
    first = tl.load(at, mask=there, other=0)
    second, third = first, first
    if WORDS == 3:
        second = tl.load(at + outputs, mask=there, other=0)
        third = tl.load(at + 2 * outputs, mask=there, other=0)
    return first, second, third


@triton.jit
def scaling_of(  # type: ignore[no-untyped-def]
    qzeros, scales, group, column, there, outputs, zero_words, BITS: tl.constexpr, OFFSET: tl.constexpr
):
    """(zero, scale) of `column` in `group`."""
    zero = zero_of(qzeros, group, column, there, zero_words, BITS) + OFFSET
    return zero, tl.load(scales + group * outputs + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def value_at(first, second, third, BITS: tl.constexpr, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Value PLACE of a period, from its words."""
    WORD: tl.constexpr = PLACE * BITS // 32
    SHIFT: tl.constexpr = PLACE * BITS % 32
    LOW: tl.constexpr = 32 - SHIFT
    here, after = first, second
    if WORD == 1:
        here, after = second, third
    if WORD == 2:
        here = third
    value = here >> SHIFT
    if LOW < BITS:
        value = (value & ((1 << LOW) - 1)) | (after << LOW)
    return value & ((1 << BITS) - 1)


@triton.jit
def values_of(  # type: ignore[no-untyped-def]
    qweight, row, column, there, inputs, outputs, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The stored weights of inputs `row` [ROWS, 1], starting at a word, for outputs `column` [1, COLUMNS].

    All at once, so that they are in the threads that store them: place by place each value would go from the thread
    that read its word to another.
    """
    if BITS == 3:  # values that cross from word to word: each reads its own, which lie in the cache
        place, shift = (row * BITS // 32).to(tl.int64) * outputs + column, row * BITS % 32
        value = tl.load(qweight + place, mask=there, other=0) >> shift
        over = there & (shift > 29)
        after = tl.load(qweight + place + outputs, mask=over, other=0)
        low = 32 - shift
        value = tl.where(over, (value & ((1 << low) - 1)) | (after << low), value)
    else:
        VALUES: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = ROWS // VALUES
        word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[:, None]
        held = (word * VALUES < inputs) & (column < outputs)
        words = tl.load(qweight + word.to(tl.int64) * outputs + column, mask=held, other=0)
        words = tl.reshape(tl.broadcast_to(words[:, None, :], (WORDS, VALUES, COLUMNS)), (ROWS, COLUMNS))
        value = words >> (row % VALUES * BITS)
    return value & ((1 << BITS) - 1)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    qweight, qzeros, scales, groups, out, inputs, outputs, zero_words, group_size, BITS: tl.constexpr,
    OFFSET: tl.constexpr, ORDERED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[in, out] of scale x (weight - zero). Without `groups`, each ROWS inputs share a group."""
    begin = tl.program_id(0) * ROWS
    row = begin + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < inputs) & (column < outputs)
    value = values_of(qweight, row, column, there, inputs, outputs, BITS, ROWS, COLUMNS)
    group = tl.load(groups + row, mask=row < inputs, other=0) if ORDERED else begin // group_size
    zero, scale = scaling_of(qzeros, scales, group, column, column < outputs, outputs, zero_words, BITS, OFFSET)
    result = (value - zero).to(tl.float32) * scale
    tl.store(out + row.to(tl.int64) * outputs + column, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def product(  # type: ignore[no-untyped-def]
    inputs, qweight, qzeros, scales, groups, parts, periods, outputs, zero_words, width, tokens, group_size,
    BITS: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr, VALUES: tl.constexpr, ORDERED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """parts [splits, tokens, out]: each input split's contribution to the product. ROWS counts periods."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    split, token = tl.program_id(1), tl.program_id(2)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, EACH, ROWS):
        row = split * EACH + begin + tl.arange(0, ROWS)[:, None]
        there = (row < periods) & (column < outputs)
        first, second, third = words_of(qweight, row, column, there, outputs, WORDS)
        group = row * VALUES // group_size
        zero, scale = scaling_of(qzeros, scales, group, column, there, outputs, zero_words, BITS, OFFSET)
        for place in tl.static_range(VALUES):
            if ORDERED:
                group = tl.load(groups + row * VALUES + place, mask=row < periods, other=0)
                zero, scale = scaling_of(qzeros, scales, group, column, there, outputs, zero_words, BITS, OFFSET)
            given = tl.load(inputs + token * width + row * VALUES + place, mask=row < periods, other=0.0)
            value = (value_at(first, second, third, BITS, place) - zero).to(tl.float32) * scale
            total += value * given.to(tl.float32)
    inside = column < outputs
    place = parts + (split * tokens + token).to(tl.int64) * outputs + column
    tl.store(place, tl.sum(total, 0)[None, :], mask=inside)
