"""Attention of one new token of each row over its keys in a cache, and the writing of its key and value.

Rows are the first of the cache's slots, each with a length of its own that is read on the device, so that a CUDA graph
can hold it. On a GPU Triton reads each key and value once, however many query heads share it; on a CPU, torch.
"""

import torch

from qdist.runtime.kernels.launching import on_device

PROGRAMS = 512
"""About how many programs a launch should have: a few for each multiprocessor of a large GPU."""
MOST_SPLITS = 16
"""Most programs that share the keys of a row."""
_PLACES = 64
"""Keys that a program reads at a time."""


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int = 0,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of each row's last token, [rows, 1, heads, size] in the query's dtype; zeros for a row without keys.

    query: [rows, heads, 1, size]. keys, values: [slots, kv_heads, positions, size], `rows` slots or more, values of a
    position contiguous. lengths: int32 or int64 [rows], keys of each row, the new token's included. window: the last
    keys that are seen; 0: all. sinks: [heads], scores that take part in the softmax and have no value (gpt-oss).
    softcap: scores are capped to softcap x tanh(score / softcap) (Gemma 2).
    """
    run = triton_attention if query.is_cuda else torch_attention
    return run(query, keys, values, lengths, scaling, window, sinks=sinks, softcap=softcap)


def torch_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int = 0,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`decode_attention` over all positions, computed in float32."""
    rows, heads, _, size = query.shape
    key, value = keys[:rows].float(), values[:rows].float()
    grouped = query.view(rows, key.shape[1], -1, size).float()
    scores = grouped @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place, last = torch.arange(key.shape[2], device=query.device), lengths.view(rows, 1, 1, 1)
    unseen = place >= last
    if window:
        unseen = unseen | (place < last - window)
    scores = scores.masked_fill(unseen, float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(1, key.shape[1], -1, 1).expand(rows, -1, -1, -1)
        scores = torch.cat((scores, extra), 3)
    shares = torch.softmax(scores, 3)[..., : key.shape[2]]
    result = shares.masked_fill(last == 0, 0.0) @ value.masked_fill((place >= last).view(rows, 1, -1, 1), 0.0)
    return result.view(rows, 1, heads, size).to(query.dtype)


def triton_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int = 0,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """`decode_attention` in one launch, or two where several programs share a row. splits: a power of two."""
    from qdist.runtime.kernels import decode_attention_triton  # Triton is there only with a GPU

    rows, heads, _, size = query.shape
    shared, positions = keys.shape[1], keys.shape[2]
    query, keys, values = (value if value.stride(-1) == 1 else value.contiguous() for value in (query, keys, values))
    lengths = lengths.contiguous()  # as a mask's they may be a view with steps
    chosen = choose_splits(rows * shared, positions if not window else min(window, positions))
    splits = chosen if splits is None else splits
    out = torch.empty((rows, 1, heads, size), dtype=query.dtype, device=query.device)
    parts = out if splits == 1 else query.new_empty((rows, heads, splits, size + 2), dtype=torch.float32)
    group, padded = heads // shared, 1 << (size - 1).bit_length()
    with on_device(query.device):
        decode_attention_triton.attend[(rows, shared, splits)](
            query, keys, values, lengths, out if sinks is None else sinks, out, parts, scaling, window, softcap or 0.0,
            positions, heads, group, size, query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3],
            WINDOW=window > 0, SOFTCAP=softcap is not None, SINKS=sinks is not None, SPLITS=splits,
            GROUP=max(16, 1 << (group - 1).bit_length()), SIZE=padded, PLACES=_places(padded, query.dtype), STAGES=2,
            num_warps=4,
        )  # fmt: skip
        if splits > 1:
            decode_attention_triton.join[(rows, heads)](
                parts, out if sinks is None else sinks, out, heads, size, SINKS=sinks is not None, SPLITS=splits,
                SIZE=padded, num_warps=4,
            )  # fmt: skip
    return out


def choose_splits(pairs: int, keys: int) -> int:
    """Programs that share the keys of a row, a power of two. pairs: rows times key heads. keys: of a row, at most."""
    wanted = min(MOST_SPLITS, PROGRAMS // max(1, pairs), -(-keys // _PLACES))
    return 1 << (max(1, wanted).bit_length() - 1)


def _places(size: int, dtype: torch.dtype) -> int:
    """Keys of a block: fewer where two stages of keys and values would not fit into shared memory."""
    return max(16, min(_PLACES, _PLACES * 256 // (size * dtype.itemsize)))


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Store the new token's keys and values of each row at its length; a row whose slot is full is left as it is.

    keys, values: [rows, kv_heads, 1, size]. cache_keys, cache_values: [slots, kv_heads, positions, size].
    lengths: int32 or int64 [rows], tokens in the cache before this one.
    """
    (triton_write if keys.is_cuda else torch_write)(keys, values, cache_keys, cache_values, lengths)


def torch_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """`write_kv` by indexing."""
    rows = torch.arange(len(keys), device=keys.device)
    place = lengths.clamp(0, cache_keys.shape[2] - 1)
    held = ((lengths >= 0) & (lengths < cache_keys.shape[2])).view(-1, 1, 1)
    for new, cache in ((keys, cache_keys), (values, cache_values)):
        cache[rows, :, place] = torch.where(held, new[:, :, 0].to(cache.dtype), cache[rows, :, place])


def triton_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    cache_keys: torch.Tensor,
    cache_values: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """`write_kv` in one launch."""
    from qdist.runtime.kernels import decode_attention_triton

    rows, heads, _, size = keys.shape
    keys, values = (value if value.stride(-1) == 1 else value.contiguous() for value in (keys, values))
    with on_device(keys.device):
        decode_attention_triton.write[(rows, heads)](
            keys, values, cache_keys, cache_values, lengths, cache_keys.shape[2], size, *keys.stride()[:2],
            *values.stride()[:2], *cache_keys.stride()[:3], *cache_values.stride()[:3],
            SIZE=1 << (size - 1).bit_length(), num_warps=1,
        )  # fmt: skip
