"""Attention that keeps the samples of one packed row apart, in the place of transformers' own."""

import inspect
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from qdist.core.errors import JobError
from qdist.runtime.model.packed import compute_dtype
from qdist.runtime.model.parts import decoder_layers

NAME = "qdist_apart"
"""Name of the attention among transformers'. Without boundaries it is their `sdpa`, in generation for example."""
_HEAD_MULTIPLE = 8
"""Widths of heads that flash attention takes."""


class Boundaries(NamedTuple):
    """Where the samples of a packed row are."""

    positions: torch.Tensor
    """Of each token in its sample, int64 [1, width]."""
    ends: torch.Tensor
    """Where samples end, from 0 up to the width, int32 [segments + 1]; some may be empty."""
    longest: int
    """Tokens of the longest sample at most: a number that is the same for all batches of a shape."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of a decoder, by transformers' names.

        A mask of four dimensions is passed on as it is. For None, transformers would look at positions for boundaries,
        which waits for the GPU, and write a mask of the whole row.
        """
        return {
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.ends.device),
            "position_ids": self.positions,
            "cu_seq_lens_q": self.ends,
            "cu_seq_lens_k": self.ends,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def keep_samples_apart(model: Any) -> None:
    """Have all of a model's attention go by boundaries, where it is given any."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", None) is not None:
            module.config._attn_implementation = NAME


def keeps_samples_apart(model: Any) -> bool:
    """Whether `keep_samples_apart` changed a model."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == NAME)


def require_apart(model: Any) -> None:
    """Raise JobError unless attention went by boundaries in every layer that is here. To follow a pass with some."""
    for index, layer in enumerate(decoder_layers(model)):
        is_here = next(layer.parameters(), None) is not None
        if is_here and not any(getattr(module, "keeps_apart", False) for module in layer.modules()):
            raise JobError(
                f"samples of a packed row see each other in layer {index}: {type(layer).__name__} does not pass "
                "boundaries to its attention",
                try_="--set pack=false",
            )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, of query, key and value [1, heads, width, head], to [1, width, heads, head].

    cu_seq_lens_q, max_length_q: `ends` and `longest` of `Boundaries`. sliding_window: tokens that one sees, itself
    among them.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
        )
    if not getattr(module, "keeps_apart", False):
        module.keeps_apart = True
    window = sliding_window if sliding_window and sliding_window < max_length_q else 0
    heads = _Heads(query, key, value)
    if query.device.type == "cpu":
        mixed = _one_by_one(heads, cu_seq_lens_q, scaling, window, dropout)
    elif dropout == 0 and _has_flash(query):
        return _flash(heads, cu_seq_lens_q, max_length_q, scaling, window)[None], None
    else:
        mixed = _masked(heads, block_mask(cu_seq_lens_q, query.shape[2], window), scaling, dropout)
    return mixed.transpose(1, 2).contiguous(), None


class _Heads(NamedTuple):
    """What attention reads, [1, heads, width, head]; keys and values may have fewer heads, values another width."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def block_mask(ends: torch.Tensor, width: int, window: int) -> torch.Tensor:
    """Which positions see which: earlier ones of their own segment, up to `window` of them if that is not 0."""
    place = torch.arange(width, device=ends.device)
    segment = torch.searchsorted(ends, place.to(ends.dtype), right=True)
    back = place[:, None] - place
    seen = (segment[:, None] == segment) & (back >= 0)
    return seen & (back < window) if window else seen


def _one_by_one(heads: _Heads, ends: torch.Tensor, scale: float | None, window: int, dropout: float) -> torch.Tensor:
    """Each sample by itself, with the work of its own length squared; where reading `ends` waits for nothing."""
    mixed = []
    for start, stop in pairwise(ends.tolist()):
        if start == stop:
            continue
        own = _Heads(*(each[:, :, start:stop] for each in heads))
        whole = torch.tensor([0, stop - start], dtype=ends.dtype)
        mask = block_mask(whole, stop - start, window) if 0 < window < stop - start else None
        mixed.append(_masked(own, mask, scale, dropout))
    return torch.cat(mixed, dim=2)


def _masked(heads: _Heads, mask: torch.Tensor | None, scale: float | None, dropout: float) -> torch.Tensor:
    """torch's fused attention under a mask, or causal without one."""
    return functional.scaled_dot_product_attention(
        *heads,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=heads.query.shape[1] != heads.key.shape[1],
    )


def _has_flash(query: torch.Tensor) -> bool:
    """Whether flash attention computes these heads: in 16 bits, from Ampere on, with windows (torch 2.11)."""
    return (
        compute_dtype(query) in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _varlen_takes("window_size")
    )


@cache
def _varlen_takes(argument: str) -> bool:
    """Whether this torch's variable-length attention has an argument; it is still changing."""
    from torch.nn.attention import varlen

    return argument in inspect.signature(varlen.varlen_attn).parameters


def _flash(heads: _Heads, ends: torch.Tensor, longest: int, scale: float | None, window: int) -> torch.Tensor:
    """torch's attention over samples of any lengths; [width, heads, head]."""
    from torch.nn.attention import varlen

    head, of_values = heads.query.shape[-1], heads.value.shape[-1]
    wide = -(-max(head, of_values) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    # Autocast gives its dtype to torch's fused attention, but not to an operator of torch's own library.
    dtype, groups = compute_dtype(heads.query), heads.query.shape[1] // heads.key.shape[1]
    query, key, value = (_widened(each[0].transpose(0, 1).to(dtype), wide) for each in heads)
    grouped: dict[str, Any] = {}
    if groups > 1 and _varlen_takes("enable_gqa"):
        grouped["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    mixed = varlen.varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=head**-0.5 if scale is None else scale,
        window_size=(window - 1 if window else -1, 0),
        **grouped,
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed[..., :of_values]


def _widened(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Heads with zeros behind them, which change no score."""
    missing = width - heads.shape[-1]
    return functional.pad(heads, (0, missing)) if missing else heads
