"""Attention over a prompt: the kernel of csrc/attention.cpp, or torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn


def attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Of a prompt, every token sees those up to itself: query [H, S, D], key, value [KV, S, D] -> [S, H, D]."""
    if accepts(query, query.shape[-1]) and torch.ops.qwenvl_tp.attend_all_supported():
        out: Tensor = torch.ops.qwenvl_tp.attend_all(query, key, value, scale, True)
        return out
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale,
                                          enable_gqa=True)[0].transpose(0, 1)


def accepts(x: Tensor, head_dim: int) -> bool:
    """Whether csrc/attention.cpp is for such numbers and heads."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16 and head_dim % 2 == 0 and head_dim <= 128


def attention_interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                **more: Any) -> tuple[Tensor, None]:
    """In the form of Transformers' AttentionInterface: query [B, H, S, D], key, value [B, KV, S', D] -> [B, S, H, D].
    What the kernel does not take goes to sdpa as Transformers has it."""
    batch, _, tokens, dim = query.shape
    fits = batch == 1 and tokens == key.shape[2] and accepts(query, dim)
    if fits and attention_mask is None and dropout == 0.0:
        scale = dim ** -0.5 if scaling is None else scaling
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return torch.ops.qwenvl_tp.attend_all(query[0], key[0], value[0], scale, causal)[None], None
    sdpa = transformers.AttentionInterface()["sdpa"]
    out: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                    is_causal=is_causal, **more)
    return out
