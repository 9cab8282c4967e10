"""The Triton kernels of `qdist.runtime.kernels.decode_attention`; import only if Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    query, keys, values, lengths, sinks, out, parts, scaling, window, softcap, positions, heads, group, size, query_row,
    query_head, key_row, key_head, key_place, value_row, value_head, value_place, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query heads that share a key head, over a split of a row's keys; several splits are joined by `join`.

    parts [rows, heads, SPLITS, size + 2]: what a split found, the largest score and the sum of exponentials.
    """
    row, shared, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + row), positions).to(tl.int32)
    first = tl.maximum(length - window, 0) // PLACES if WINDOW else 0
    blocks = tl.cdiv(length, PLACES) - first
    each = tl.cdiv(blocks, SPLITS)
    begin, end = (first + split * each) * PLACES, (first + tl.minimum((split + 1) * each, blocks)) * PLACES
    inner, column = tl.arange(0, GROUP), tl.arange(0, SIZE)
    head = shared * group + inner
    there = (inner < group)[:, None] & (column < size)[None, :]
    wanted = tl.load(query + row * query_row + head[:, None] * query_head + column[None, :], mask=there, other=0.0)
    largest = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((GROUP,), dtype=tl.float32)
    found = tl.zeros((GROUP, SIZE), dtype=tl.float32)
    keys += row * key_row + shared * key_head
    values += row * value_row + shared * value_head
    for start in tl.range(begin, end, PLACES, num_stages=STAGES):
        place = start + tl.arange(0, PLACES)
        held = (place < length)[:, None] & (column < size)[None, :]
        key = tl.load(keys + place[:, None].to(tl.int64) * key_place + column[None, :], mask=held, other=0.0)
        score = tl.dot(wanted, tl.trans(key), input_precision="ieee") * scaling
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        seen = place < length
        if WINDOW:
            seen &= place >= length - window
        score = tl.where(seen[None, :], score, float("-inf"))
        more = tl.maximum(largest, tl.max(score, 1))
        safe = tl.where(more == float("-inf"), 0.0, more)
        share = tl.exp(score - safe[:, None])
        old = tl.exp(largest - safe)
        value = tl.load(values + place[:, None].to(tl.int64) * value_place + column[None, :], mask=held, other=0.0)
        found = found * old[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        weight = weight * old + tl.sum(share, 1)
        largest = more
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=inner < group, other=0.0).to(tl.float32)
            safe = tl.where(largest == float("-inf"), 0.0, largest)
            weight += tl.where(length > 0, tl.exp(sink - safe), 0.0)
        found = found / tl.where(weight == 0.0, 1.0, weight)[:, None]
        place = (row * heads + head[:, None]) * size + column[None, :]
        tl.store(out + place, found.to(out.dtype.element_ty), mask=there)
    else:
        place = ((row * heads + head) * SPLITS + split) * (size + 2)
        tl.store(parts + place[:, None] + column[None, :], found, mask=there)
        tl.store(parts + place + size, largest, mask=inner < group)
        tl.store(parts + place + size + 1, weight, mask=inner < group)


@triton.jit
def join(parts, sinks, out, heads, size, SINKS: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A head of a row from what each split found; zeros if no split saw a key."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    place = ((row * heads + head) * SPLITS + split) * (size + 2)
    largest, weight = tl.load(parts + place + size), tl.load(parts + place + size + 1)
    most = tl.max(largest, 0)
    any_key = most > float("-inf")
    safe = tl.where(any_key, most, 0.0)
    share = tl.exp(largest - safe)
    there = (column < size)[None, :] & (split < SPLITS)[:, None]
    found = tl.load(parts + place[:, None] + column[None, :], mask=there, other=0.0)
    total = tl.sum(share * weight, 0)
    if SINKS:
        total += tl.where(any_key, tl.exp(tl.load(sinks + head).to(tl.float32) - safe), 0.0)
    result = tl.sum(found * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * heads + head) * size + column, result.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def write(  # type: ignore[no-untyped-def]
    keys, values, cache_keys, cache_values, lengths, positions, size, row_step, head_step, value_row, value_head,
    key_row, key_head, key_place, cached_row, cached_head, cached_place, SIZE: tl.constexpr,
):  # fmt: skip
    """A head's new key and value of a row, behind those that it has; nothing if the cache is full."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, column = tl.load(lengths + row).to(tl.int64), tl.arange(0, SIZE)
    there = (column < size) & (place >= 0) & (place < positions)
    key = tl.load(keys + row * row_step + head * head_step + column, mask=there)
    target = cache_keys + row * key_row + head * key_head + place * key_place + column
    tl.store(target, key.to(cache_keys.dtype.element_ty), mask=there)
    value = tl.load(values + row * value_row + head * value_head + column, mask=there)
    target = cache_values + row * cached_row + head * cached_head + place * cached_place + column
    tl.store(target, value.to(cache_values.dtype.element_ty), mask=there)
