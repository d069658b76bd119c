"""The prompt's forward: Transformers' own, its layers on CPU with a decode step's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapter.generation.decoder import Decoder
from adapter.generation.kv_cache import KVCache, cached
from adapter.kernels import fused
from adapter.kernels.attention import attend_causal


def prefill(decoder: Decoder, forward: Callable[[], Any], mask: Tensor, length: int) -> tuple[Tensor, KVCache]:
    """Run the model's own forward over the prompt -> its last logits [B, vocab] and the state after it.

    mask: int64 [B, prompt], 0 for the padding on the left; length: places of the cache.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    reading = FastPrefill(decoder, mask, length)
    hook = decoder.rotary.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with reading.instead():
            output = forward()
    finally:
        hook.remove()
    batch, prompt = mask.shape
    keys, values = reading.keys, reading.values
    for i in range(len(keys), len(decoder.layers)):  # none, or all of them
        for to, old in zip((keys, values), cached(output.past_key_values, i), strict=True):
            # torch multiplies what it masks by zero: nothing there may be no number
            make = old.new_zeros if decoder.ops is fused.TorchOps else old.new_empty
            new = make(batch, old.shape[1], length, old.shape[3])
            new[:, :, :prompt] = old
            to.append(new)
    # the next position is one after the largest of the prompt, whose pictures take fewer positions than tokens
    largest = (seen[-1] * mask).amax(-1)
    if largest.ndim == 2:
        largest = largest.amax(0)
    positions = largest[:, None] + 1 + torch.arange(length - prompt, device=mask.device)
    if seen[-1].ndim == 3:
        positions = positions.expand(seen[-1].shape[0], -1, -1)
    cos, sin = decoder.rotary(keys[0], positions)
    cos, sin = (t[0] if t.ndim == 4 else t for t in (cos, sin))  # of a new token all three coordinates are equal
    start = prompt - mask.sum(-1)
    place = torch.tensor([prompt], device=mask.device)
    cos, sin = cos.transpose(0, 1).contiguous(), sin.transpose(0, 1).contiguous()
    return output.logits[:, -1], KVCache(keys, values, cos, sin, start, place)


class FastPrefill:
    """The layers of the text encoder over a prompt, on CPU: what their own forwards compute, with a step's operators;
    keys and values go to their places in `KVCache`. Of the last layer only the last position is computed: nobody asks
    for other logits. What is around the layers (pictures, positions, rotary tables) stays Transformers'.

    keys, values: as in `KVCache`, of every layer; of none where the layers' own forwards ran.
    """

    def __init__(self, decoder: Decoder, mask: Tensor, length: int) -> None:
        self.decoder, self.length = decoder, length
        self.start = (mask.shape[1] - mask.sum(-1)).tolist()
        self.keys, self.values = list[Tensor](), list[Tensor]()

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within, a layer's forward is this one, unless somebody has put hooks or a forward of theirs into a layer."""
        layers = self.decoder.whole
        inside = [module for layer in layers for module in layer.modules()]
        touched = any(m._forward_hooks or m._forward_pre_hooks for m in inside) \
            or any("forward" in m.__dict__ for m in inside)
        if self.decoder.ops is fused.TorchOps or touched:
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
        """x [B, S, hidden] -> the same, of the last layer [B, 1, hidden]; of a release whose layers get rotary tables
        that are not yet those of the positions, what `own` returns."""
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        if args or cos is None or sin is None or cos.ndim != 3:
            return own(x, *args, **kwargs)
        decoder, layer, ops = self.decoder, self.decoder.layers[i], self.decoder.ops
        h = ops.rms_norm(x, layer.attention_norm.weight, decoder.eps)
        q, k, v = (part.forward(h) for part in (layer.q, layer.k, layer.v))
        last = i + 1 == len(decoder.layers)
        a = self.attend(q, k, v, cos.float(), sin.float())
        x, a = (t[:, -1:].contiguous() if last else t for t in (x.clone(), a))
        h = ops.add_rms_norm(x, layer.o.forward(a), layer.mlp_norm.weight, decoder.eps)
        return x.add_(layer.down.forward(ops.silu_mul(layer.gate.forward(h), layer.up.forward(h))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [B, S, heads * D], k, v [B, S, KV heads * D], not rotated; cos, sin float32 [B, S, D] -> like q, zero where
        a row is padding."""
        dim, out = cos.shape[-1], torch.zeros_like(q)
        q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))
        for part in (q, k):
            torch.ops.qwenvl_tp.rotate(part.view(-1, *part.shape[2:]), cos.flatten(0, 1), sin.flatten(0, 1))
        for to, new in ((self.keys, k), (self.values, v)):
            to.append(new.new_empty(len(new), new.shape[2], self.length, dim))
            to[-1][:, :, :new.shape[1]] = new.transpose(1, 2)
        for b, start in enumerate(self.start):
            mine, keys, values = (t[b, start:].transpose(0, 1) for t in (q, k, v))
            out[b, start:] = attend_causal(mine, keys, values, self.decoder.scale).flatten(1)
        return out
