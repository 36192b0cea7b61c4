"""Attention for packed micro-batches: each segment attends to itself, through torch's fused kernels.

transformers' own SDPA path builds a mask of tokens × tokens for a packed batch, which is right but
makes a pack cost the square of its length; per segment it costs the sum of the squares.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "tfslurm_segments"


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Causal attention within the segments whose bounds are `cu_seq_lens_q` (int32, on the CPU).

    Shapes as transformers passes them: query [1, heads, tokens, width], key and value [1, kv heads,
    tokens, width]; returns [1, tokens, heads, width]. Raises ValueError without segment bounds.
    """
    if cu_seq_lens_q is None:
        raise ValueError(f"{type(module).__name__} does not pass the bounds of the packed segments on")
    lengths = cu_seq_lens_q.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **_causal(q, sliding_window))
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _causal(query: torch.Tensor, window: int | None) -> dict:
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": True}
    distance = torch.arange(length, device=query.device)
    distance = distance[:, None] - distance[None, :]
    return {"attn_mask": (distance >= 0) & (distance < window)}


def supports_segments(config) -> bool:
    """Whether a model's attention is plain: no soft caps, sinks or other masks than causal and sliding."""
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "attention_chunk_size", None):
        return False
    return text.model_type not in ("gpt_oss",)


AttentionInterface.register(NAME, segment_attention)
