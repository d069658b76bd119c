"""The KV cache of a batch that is being generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class KVCache:
    """A batch that is being generated. keys, values: of each layer [B, KV heads, L, head_dim]; cos, sin [L - prompt, B,
    head_dim]; start int64 [B]: the first place of each row that is no padding; place int64 [1]: that of the next token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    start: Tensor
    place: Tensor


def cached(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, KV heads, S, head_dim] of one layer of a DynamicCache of any release."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]
