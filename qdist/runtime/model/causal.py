"""Masks of whole causal micro-batches that are the same whether a CUDA graph is being captured or not.

transformers 5.17 writes out a mask while a graph is captured, since it may not look at values then, and otherwise asks
the GPU whether positions start anew. So a graph would compute another attention kernel than the eager pass, more slowly
and with other rounding (7e-4 of the loss of a random 7B), and the eager pass would wait for the GPU. Issue 18.
"""

from typing import Any

import torch

NAME = "qdist_causal"
"""Of the attention in transformers' registries: torch's, with the mask below."""


def take_whole_rows(model: Any) -> None:
    """Have a model that computes torch's attention compute it without looking at masks; any other is left alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, causal_mask)
    config._attn_implementation = NAME


def takes_whole_rows(model: Any) -> bool:
    """Whether `take_whole_rows` changed a model."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == NAME)


def whole_rows(inputs: torch.Tensor) -> torch.Tensor:
    """The mask of rows in which every token may be seen, bool [rows, width], known as such without being read."""
    mask: Any = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    mask.qdist_is_whole = True
    seen: torch.Tensor = mask
    return seen


def causal_mask(
    *,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **named: Any,
) -> torch.Tensor | None:
    """transformers' mask for torch's attention; none where rows are whole and causal attention needs none.

    local_size: of a sliding window. The other arguments are those of `transformers.masking_utils.sdpa_mask`.
    """
    from transformers.masking_utils import sdpa_mask

    if getattr(attention_mask, "qdist_is_whole", False):
        if allow_is_causal_skip and (local_size is None or kv_length <= local_size):
            return None
        attention_mask, allow_is_causal_skip = None, False
    mask: torch.Tensor | None = sdpa_mask(
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **named,
    )
    return mask
