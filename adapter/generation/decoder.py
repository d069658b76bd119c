"""The text decoder of an injected model, taken apart, and its step: one token of every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.generation.kv_cache import KVCache
from adapter.model.published import PublishedModules
from adapter.planning.plan import Plan
from policies.policy import DecoderNames


@dataclass(frozen=True)
class Layer:
    """The modules of one layer of the text decoder that compute something. sparse: a router and experts, in place of
    gate, up and down."""

    attention_norm: nn.Module
    q: nn.Module
    q_norm: nn.Module | None
    k: nn.Module
    k_norm: nn.Module | None
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: Any
    up: Any
    down: Any
    sparse: nn.Module | None = None


class Decoder:
    """The text decoder's modules as they are now, and what one step of them computes.

    Raises LookupError, in words, where the model is not what the policy's `decoder` says: a module is missing, there is
    one that the page does not name, or one computes something else.

    ops: `rms_norm`, `add_rms_norm`, `silu_mul`, `visible` and `attend` (adapter.kernels.fused).
    """

    def __init__(self, model: nn.Module, plan: Plan, ops: Any, rank: int = 0) -> None:
        names, stack = named(plan), plan.geometry.text_stack
        modules: Mapping[str, Any] = PublishedModules(model, plan.policy)
        count = plan.geometry.layers[stack]
        try:
            self.layers = [_layer(modules, names, f"{stack}.{i}") for i in range(count)]
            self.whole = [modules[f"{stack}.{i}"] for i in range(count)]
            self.attentions = [modules[f"{stack}.{i}.{names.attention}"] for i in range(count)]
            self.activations = [modules[f"{stack}.{i}.{names.activation}"] for i, layer in enumerate(self.layers)
                                if layer.sparse is None]
            self.embedding, self.rotary = modules[names.embedding], modules[names.rotary]
            self.norm, self.head = modules[names.norm], modules[names.head]
            self.eps = float(self.norm.variance_epsilon)
        except (KeyError, AttributeError) as missing:
            raise LookupError(f"this release has no {missing} in {type(model).__name__}") from None
        self.kv_heads, self.head_dim = plan.heads["text"][rank].kv_heads, plan.geometry.attention["text"].head_dim
        self.scale = self.head_dim ** -0.5
        self.injected_layers = plan.geometry.injected_layers
        self.ops = ops
        check_total(model, plan)
        self._check_formula(model)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def addresses(self) -> tuple[int, ...]:
        """Where all that a step reads of the model lies; it changes when somebody puts other weights in."""
        parts = [self.embedding, self.norm, self.head]
        for layer in self.layers:
            parts += [part for name, part in vars(layer).items() if part and name != "sparse"]
        tensors = [tensor for part in parts for tensor in (part.weight, getattr(part, "bias", None))]
        tensors += [tensor for layer in self.layers if layer.sparse for tensor in layer.sparse.parameters()]
        return tuple(t.data_ptr() if isinstance(t, Tensor) else id(t) for t in tensors)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [rows, vocab] of the next token. ids: int64 [rows], each row's newest token, whose keys and values go
        to the cache's `place`, which moves on by one."""
        ops = self.ops
        cos, sin = cache.rope_at_place()
        visible = ops.visible(cache.first, cache.place, cache.attended)
        residual = self.embedding.look_up(ids)
        normed = ops.rms_norm(residual, self.layers[0].attention_norm.weight, self.eps)
        for i, layer in enumerate(self.layers):
            keys, values = cache.layer(i)
            q, k, v = self.projected(layer, normed)
            heads = ops.attend(q, k, v, cos, sin, keys, values, visible, cache.place, self.scale)
            attended = layer.o.forward(heads)
            normed = ops.add_rms_norm(residual, attended, layer.mlp_norm.weight, self.eps)
            last = i + 1 == len(self.layers)
            next_norm = self.norm if last else self.layers[i + 1].attention_norm
            normed = ops.add_rms_norm(residual, self.fed_forward(layer, normed), next_norm.weight, self.eps)
        cache.place += 1
        logits: Tensor = self.head.forward(normed)
        return logits

    def fed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        """What a layer's MLP, or its experts, make of x [*, hidden]."""
        if layer.sparse is not None:
            mixed: Tensor = layer.sparse.forward(x.view(-1, 1, x.shape[-1]))
            return mixed.view(x.shape)
        fed: Tensor = layer.down.forward(self.ops.silu_mul(layer.gate.forward(x), layer.up.forward(x)))
        return fed

    def projected(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [*, heads x head_dim] of x [*, hidden], not rotated, normalised where the family
        does it."""
        q, k, v = layer.q.forward(x), layer.k.forward(x), layer.v.forward(x)
        return self._normalised(q, layer.q_norm), self._normalised(k, layer.k_norm), v

    def _normalised(self, x: Tensor, norm: Any) -> Tensor:
        """x [*, heads x head_dim], each head by itself."""
        if norm is None:
            return x
        normed: Tensor = self.ops.rms_norm(x.unflatten(-1, (-1, self.head_dim)), norm.weight, self.eps)
        return normed.flatten(-2)

    def _check_formula(self, model: nn.Module) -> None:
        """Raises LookupError where the modules are all there and one computes something else than `step`."""
        probe = torch.linspace(-3, 3, 16)
        if not all(torch.equal(act(probe), F.silu(probe)) for act in self.activations):
            raise LookupError("the MLP's activation is not SiLU")
        norms: list[Any] = [norm for layer in self.layers
                            for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm) if norm]
        if any(getattr(norm, "variance_epsilon", None) != self.eps for norm in norms):
            raise LookupError("its norms have unlike epsilons")
        config: Any = model.config
        if getattr(config.get_text_config(), "use_sliding_window", False):
            raise LookupError("the model attends to a sliding window")
        if any(getattr(attention, "scaling", self.scale) != self.scale for attention in self.attentions):
            raise LookupError("attention does not scale by 1 / sqrt(head_dim)")


def _layer(modules: Mapping[str, Any], names: DecoderNames, prefix: str) -> Layer:
    """The layer whose modules' names begin with `prefix`. Raises KeyError where one is missing."""
    sparse = names.experts is not None and f"{prefix}.{names.experts}" in modules
    absent = ("gate", "up", "down") if sparse else ()
    stated = {part: None if part in absent else getattr(names, part)
              for part in Layer.__dataclass_fields__ if part != "sparse"}
    parts: dict[str, Any] = {part: name and modules[f"{prefix}.{name}"] for part, name in stated.items()}
    return Layer(**parts, sparse=modules[f"{prefix}.{names.mlp}"] if sparse else None)


def named(plan: Plan) -> DecoderNames:
    """The page's names. Raises LookupError where a step of this family is not the one computed here."""
    if plan.policy.decoder is None:
        raise LookupError(f"a step of {plan.policy.model_type} is another one: {plan.policy.not_decoded}")
    return plan.policy.decoder


def text_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Name -> module of everything that is not the vision encoder or inside it, the model itself ("") included."""
    encoder, modules = plan.policy.encoder, dict(model.named_modules())
    layers = next(name for name in modules if plan.policy.published(name) == encoder.stack)
    vision = layers.removesuffix(encoder.stack.removeprefix(encoder.module))
    return {name: module for name, module in modules.items() if name != vision and not name.startswith(f"{vision}.")}


def check_total(model: nn.Module, plan: Plan) -> None:
    """Raises LookupError where the text decoder has a module, or a parameter of its own between the modules, that the
    policy's page does not name: a step would leave it out."""
    names, stack = named(plan), plan.geometry.text_stack
    layers = range(plan.geometry.layers[stack])
    computing = {names.embedding, names.rotary, names.norm, names.head}
    computing |= {f"{stack}.{i}.{part}" for i in layers for part in names.computing()}
    unused = {f"{stack}.{i}.{part}" for i in layers for part in names.unused}
    own = (names.activation, names.experts) if names.experts else (names.activation,)  # they have modules of their own
    inside = tuple(f"{stack}.{i}.{part}." for i in layers for part in own)
    modules = text_modules(model, plan)
    published = {name: plan.policy.published(name) for name in modules}
    real = [name for name in modules if published[name] in computing]
    around = {name[:at] for name in real for at in range(len(name)) if at == 0 or name[at] == "."}
    for name, module in modules.items():
        if published[name] in computing | unused or published[name].startswith(inside):
            continue
        if name not in around:
            raise LookupError(f"{name} ({type(module).__name__}) is not among the modules that the family's page "
                              "names (decoder, in policies/families/)")
        if module._parameters:
            raise LookupError(f"{name} has parameters of its own ({', '.join(module._parameters)}), which the "
                              "family's page does not name")
