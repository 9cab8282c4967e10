"""How does the token of each row see its own row's keys, in the place of transformers' own attention?

transformers' model asks for a mask and hands it on to each layer's attention. Of a step, the mask that it gets here is
no mask but numbers, int64 [rows, 1, 1, seen]: its values are the keys that each row has, its last dimension is how many
of the latest of them a token sees, by the layer's window. They are int32 where every row has all keys: nothing is
masked then. So it says all that attention must know, whatever the model passes on, and on whichever device a layer is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from qdist.core.errors import ModelError
from qdist.runtime.kernels.decode_attention import decode_attention

NAME = "qdist_decode"
"""Of the attention in transformers' registries."""
_NUMBERS = (torch.int64, torch.int32)
_BLOCK = 256
"""Tokens of a prompt whose scores are written out at a time: of 64 heads over 2,048 keys they take 0.13 GiB."""


class UndecodableError(ModelError):
    """A model's attention cannot be computed by rows."""


def configurations_of(model: nn.Module) -> list[Any]:
    """The configurations by which a model's modules choose their attention."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) is not None]


@contextmanager
def attention_by_rows(configurations: Sequence[Any]) -> Iterator[None]:
    """Have a model compute its attention here, for the time of a pass."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of_rows)
    before = [config._attn_implementation for config in configurations]
    try:
        for config in configurations:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configurations, before, strict=True):
            config._attn_implementation = name


def mask_of_rows(
    *,
    q_offset: int | torch.Tensor = 0,
    kv_length: int,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **named: Any,
) -> torch.Tensor | None:
    """What the layers of a kind are told: in a prefill transformers' mask, in a step the numbers described above.

    q_offset: of a step the keys that each row has, int64 [rows]. local_size: of a sliding window. The other arguments
    are those of `transformers.masking_utils.sdpa_mask`.
    """
    if not isinstance(q_offset, torch.Tensor):
        from transformers.masking_utils import sdpa_mask

        mask: torch.Tensor | None = sdpa_mask(
            q_offset=q_offset,
            kv_length=kv_length,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            **named,
        )
        return mask
    if use_vmap or not allow_is_causal_skip:
        raise UndecodableError("its tokens do not see just those before them")
    seen = min(local_size or kv_length, kv_length)
    if not q_offset.is_cuda and int(q_offset.min()) == kv_length:  # once a pass, not in each layer
        q_offset = q_offset.to(torch.int32)
    return q_offset.view(-1, 1, 1, 1).expand(-1, 1, 1, seen)


class _Extras(NamedTuple):
    """What some models add to attention."""

    softcap: float | None
    sinks: torch.Tensor | None
    """A score for each head that takes its share of the probability, [heads]."""

    def __bool__(self) -> bool:
        return self.softcap is not None or self.sinks is not None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, of query, key and value [rows, heads, width, head], to [rows, width, heads,
    head].

    softcap: of Gemma 2's scores. s_aux: gpt-oss's sinks, [heads].
    """
    if position_bias is not None:
        raise UndecodableError("its attention adds a bias to scores")
    extras = _Extras(softcap, s_aux)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == key.shape[2]:
        return _of_prompts(module, query, key, value, attention_mask, scale, extras), None
    if attention_mask is None or attention_mask.dtype not in _NUMBERS or query.shape[2] != 1:
        raise UndecodableError(f"{type(module).__name__} makes a mask of its own")
    if not getattr(module, "attends_by_rows", False):
        module.attends_by_rows = True
    window = attention_mask.shape[-1] if attention_mask.shape[-1] < key.shape[2] else 0
    has_all = attention_mask.dtype == torch.int32
    return _of_rows(query, key, value, attention_mask[:, 0, 0, 0], scale, window, extras, has_all=has_all), None


def _of_prompts(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scale: float, extras: _Extras,
) -> torch.Tensor:  # fmt: skip
    """Of whole prompts: torch's attention, or written out for a block of tokens at a time."""
    if not extras:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mixed: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
        return mixed
    width, heads = query.shape[2], key.shape[1]
    if mask is None:
        mask = torch.ones((1, 1, width, width), dtype=torch.bool, device=query.device).tril()
    groups, blocks = query.shape[1] // heads, []
    for own, seen in zip(query.split(_BLOCK, dim=2), mask.split(_BLOCK, dim=2), strict=True):
        grouped = own.unflatten(1, (heads, groups)).flatten(2, 3)
        block = _written_out(grouped, key, value, seen.repeat(1, 1, groups, 1), scale, extras)
        blocks.append(block.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2))
    return torch.cat(blocks, dim=1)


def _of_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, scale: float, window: int,
    extras: _Extras, *, has_all: bool,
) -> torch.Tensor:  # fmt: skip
    """Of one token of each row; [rows, 1, heads, head]. has_all: every row has all keys, so there is nothing to mask.

    Query heads that share a key head are computed as if they were the tokens of one: no key is repeated.
    """
    if query.is_cuda and key.shape[-1] == value.shape[-1]:
        return decode_attention(query, key, value, lengths, scale, window, sinks=extras.sinks, softcap=extras.softcap)
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    if has_all:
        key, value, mask = key[:, :, -window:], value[:, :, -window:], None
    else:
        place = torch.arange(key.shape[2], device=key.device)
        seen = place < lengths[:, None]
        mask = (seen & (place >= lengths[:, None] - window) if window else seen)[:, None, None]
    if extras:
        mixed = _written_out(grouped, key, value, mask, scale, extras)
    else:
        mixed = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return mixed.reshape(query.shape[0], 1, query.shape[1], -1)


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float,
    extras: _Extras,
) -> torch.Tensor:  # fmt: skip
    """Attention of query [rows, kv_heads, groups x width, head] whose scores are capped or have sinks beside them."""
    scores = (query @ key.transpose(2, 3)).float() * scale
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if extras.sinks is None:
        return scores.softmax(-1).to(value.dtype) @ value
    heads, groups = query.shape[1], len(extras.sinks) // query.shape[1]
    each = extras.sinks.float().view(heads, groups).repeat_interleave(query.shape[2] // groups, dim=1)
    beside = each[None, :, :, None].expand(query.shape[0], -1, -1, -1)
    shares = torch.cat((scores, beside), dim=-1).softmax(-1)[..., :-1]
    return shares.to(value.dtype) @ value
