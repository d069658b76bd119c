"""The prompt: Transformers' own forward, its layers computed with a step's operators where every rank has them, and the
KV cache after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adapter.generation.decoder import Decoder
from adapter.generation.kv_cache import Buffers, KVCache, Room
from adapter.kernels.attention import attend_causal
from adapter.kernels.fused import TorchOps

Forward = Callable[[Any], Any]  # Transformers' cache to use -> the model's output


class PromptCache(DynamicCache):
    """A cache of Transformers' that is empty for whoever asks, and hands the prompt's keys and values on to where a
    decode step reads them. They are never in memory twice."""

    def __init__(self, write: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.write = write

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [batch, KV heads, prompt, head_dim] of one layer, which attends to no others."""
        self.write(layer_idx, key_states, value_states)
        return key_states, value_states


def prefill(decoder: Decoder, forward: Forward, mask: Tensor, room: Room, buffers: Buffers) -> tuple[Tensor, KVCache]:
    """Run the model's own forward over the prompt -> its last logits [batch, vocab], and the cache after it.

    mask: int64 [batch, prompt], 0 for the padding on the left.
    """
    cache = allocate(decoder, mask, room, buffers)
    positions = list[Tensor]()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    hook = decoder.rotary.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with FastPrefill(decoder, cache, mask).installed():
            output = forward(PromptCache(cache.write))
    finally:
        hook.remove()
    fill_rotary_tables(decoder, cache, positions[-1], mask)
    return output.logits[:, -1], cache


def allocate(decoder: Decoder, mask: Tensor, room: Room, buffers: Buffers) -> KVCache:
    """A cache for the prompts of `mask` (as in `prefill`), still without them."""
    batch, prompt = mask.shape
    device, dtype, dim = mask.device, decoder.norm.weight.dtype, decoder.head_dim

    def take(name: str, *shape: int, dtype: Any = dtype) -> Tensor:
        return buffers.take(name, shape, dtype, device)

    shape = (len(decoder.layers), room.rows, decoder.kv_heads, room.length, dim)
    keys, values = take("keys", *shape), take("values", *shape)
    cos, sin = take("cos", room.tables, room.rows, dim), take("sin", room.tables, room.rows, dim)
    first = take("first", room.rows, dtype=torch.int64).zero_()
    if room.zeroed:
        for tensor in (keys, values, cos, sin):
            tensor.zero_()
    first[:batch] = prompt - mask.sum(-1)
    place = take("place", 1, dtype=torch.int64).fill_(prompt)
    start = take("prompt", 1, dtype=torch.int64).fill_(prompt)
    layers = range(len(decoder.layers))
    return KVCache([keys[i] for i in layers], [values[i] for i in layers], cos, sin, first, start, place, room.length)


def fill_rotary_tables(decoder: Decoder, cache: KVCache, positions: Tensor, mask: Tensor) -> None:
    """The tables of the positions after the prompt. positions: int64 [batch, prompt], or [3 or more, batch, prompt],
    those of the prompt, whose images and videos take fewer positions than tokens: the next is one after the largest."""
    batch, prompt = mask.shape
    largest = (positions * mask).amax(-1)
    if positions.ndim == 3:
        largest = largest.amax(0)
    count = min(len(cache.cos), cache.length - prompt)
    following = largest[:, None] + 1 + torch.arange(count, device=mask.device)
    if positions.ndim == 3:
        following = following.expand(len(positions), -1, -1)
    cos, sin = decoder.rotary(cache.keys[0], following)
    if cos.ndim == 4:  # one for each coordinate, which are equal of a new token
        cos, sin = cos[0], sin[0]
    cache.cos[:count, :batch] = cos.transpose(0, 1)
    cache.sin[:count, :batch] = sin.transpose(0, 1)


class FastPrefill:
    """The layers over a prompt with a step's compiled operators; of the last layer only the last position is computed,
    since nobody asks for other logits. What is around the layers stays Transformers'.

    All ranks of a group must do it or none: the last layer sums [batch, 1, hidden] over them.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, mask: Tensor) -> None:
        self.decoder, self.cache = decoder, cache
        self.starts: list[int] = (mask.shape[1] - mask.sum(-1)).tolist()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, a layer's forward is `layer`; nothing changes where a step's operators are torch's."""
        layers = self.decoder.whole
        if self.decoder.ops is TorchOps:
            yield
            return
        try:
            for i, layer in enumerate(layers):
                layer.forward = partial(self.layer, i, layer.forward)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def layer(self, i: int, own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Layer i. x: [batch, S, hidden] -> the same; of the last layer [batch, 1, hidden]. In a release whose layers
        get rotary tables of every coordinate, what `own`, the layer's own forward, returns."""
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        if args or cos is None or sin is None or cos.ndim != 3:
            return own(x, *args, **kwargs)
        layer, ops, eps = self.decoder.layers[i], self.decoder.ops, self.decoder.eps
        normed = ops.rms_norm(x, layer.attention_norm.weight, eps)
        heads = self.attend(i, *self.decoder.projected(layer, normed), cos.float(), sin.float())
        if i + 1 == len(self.decoder.layers) and i >= self.decoder.injected_layers:
            residual = x[:, -1:].contiguous()
            heads = heads[:, -1:].contiguous()
        else:
            residual = x.clone()
        normed = ops.add_rms_norm(residual, layer.o.forward(heads), layer.mlp_norm.weight, eps)
        return residual.add_(self.decoder.fed_forward(layer, normed))

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [batch, S, heads * D], k, v [batch, S, KV heads * D], not rotated; cos, sin float32 [batch, S, D] -> like
        q, zero where a row is padding. Keys and values go to the cache."""
        dim, out = cos.shape[-1], torch.zeros_like(q)
        q, k, v = q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim)), v.unflatten(-1, (-1, dim))
        for part in (q, k):
            torch.ops.qwenvl_tp.rotate(part.view(-1, *part.shape[2:]), cos.flatten(0, 1), sin.flatten(0, 1))
        self.cache.write(i, k.transpose(1, 2), v.transpose(1, 2))
        for row, start in enumerate(self.starts):
            queries, keys, values = q[row, start:], k[row, start:], v[row, start:]
            attended = attend_causal(queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1),
                                     self.decoder.scale)
            out[row, start:] = attended.flatten(1)
        return out
