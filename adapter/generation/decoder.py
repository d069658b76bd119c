"""The text model of an injected model, taken apart for decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.generation.kv_cache import KVCache
from adapter.kernels import fused
from adapter.model.published import PublishedModules
from adapter.planning.plan import Plan


@dataclass(frozen=True)
class Layer:
    """The parts of one layer of the text encoder."""

    attention_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Decoder:
    """The text encoder of an injected model, taken apart. Raises LookupError, in words, where it is not as the policy's
    `decoder` says."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        modules: Mapping[str, Any] = PublishedModules(model, plan.policy)
        names, stack = plan.policy.decoder, plan.geometry.text_stack
        count = plan.geometry.layers[stack]
        try:
            parts = {name: [modules[f"{stack}.{i}.{getattr(names, name)}"] for i in range(count)]
                     for name in Layer.__dataclass_fields__}
            acts = [modules[f"{stack}.{i}.{names.mlp}"].act_fn for i in range(count)]
            self.embedding, self.rotary = modules[names.embedding], modules[names.rotary]
            self.norm, self.head = modules[names.norm], modules[names.head]
            self.eps = float(self.norm.variance_epsilon)
        except (KeyError, AttributeError) as missing:
            raise LookupError(f"this release has no {missing} in {type(model).__name__}") from None
        probe = torch.linspace(-3, 3, 16)
        if not all(torch.equal(act(probe), F.silu(probe)) for act in acts):
            raise LookupError("the MLP's activation is not SiLU")
        config: Any = model.config
        if getattr(config.get_text_config(), "use_sliding_window", False):
            raise LookupError("the model attends to a sliding window")
        self.layers = [Layer(**{name: found[i] for name, found in parts.items()}) for i in range(count)]
        self.whole = [modules[f"{stack}.{i}"] for i in range(count)]
        self.scale = plan.geometry.attention["text"].head_dim ** -0.5
        self.device = next(model.parameters()).device
        self.ops = fused.operators(self.device.type)

    def step(self, ids: Tensor, state: KVCache) -> Tensor:
        """ids int64 [B]: each row's newest token -> logits [B, vocab] of the next. Fills `state` at its place."""
        ops, step = self.ops, state.place - (state.keys[0].shape[2] - state.cos.shape[0])
        cos, sin = state.cos[step][0], state.sin[step][0]
        x = self.embedding.look_up(ids)
        layer = self.layers[0]
        h = ops.rms_norm(x, layer.attention_norm.weight, self.eps)
        for i, layer in enumerate(self.layers):
            a = ops.attend(layer.q.forward(h), layer.k.forward(h), layer.v.forward(h), cos, sin, state.keys[i],
                           state.values[i], state.start, state.place, self.scale)
            h = ops.add_rms_norm(x, layer.o.forward(a), layer.mlp_norm.weight, self.eps)
            h = layer.down.forward(ops.silu_mul(layer.gate.forward(h), layer.up.forward(h)))
            after = self.layers[i + 1].attention_norm if i + 1 < len(self.layers) else self.norm
            h = ops.add_rms_norm(x, h, after.weight, self.eps)
        state.place += 1
        logits: Tensor = self.head.forward(h)
        return logits
