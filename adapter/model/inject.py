"""Put a plan into a model: parallel layers for whole ones, filled from a checkpoint or from the model itself.

One walk over the plan's modules, in the table's order: read this rank's slice, build the layer, put it in place, let
the old one go. Peak memory is the shard so far plus one tensor, whether the model was built on `meta` or loaded before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import Shards
from adapter.kernels import linear as kernels
from adapter.kernels import malloc
from adapter.kernels.fused import fuse
from adapter.kernels.linear import Quantised, Weight
from adapter.model import layers, vision_data_parallel
from adapter.model.attention import override_heads, use_fast_attention
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from policies.policy import Policy
from policies.rules import Claim, Column, FusedQKV, Head, Replicated, Row, Rule, TensorSlice, Vocab

GIVE_BACK_EVERY = 32 << 20  # bytes of a shard
Source = Callable[[str, TensorSlice], Weight]


def checkpoint_source(checkpoint: Checkpoint | Shards, rank: int) -> Source:
    """Slices read from files; of shards all that `rank` holds is read at once."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.read
    held = checkpoint.load(rank)

    def read(name: str, part: TensorSlice) -> Weight:
        assert held[name].shape == part.local_shape, (name, held[name].shape, part)
        return held.pop(name)

    return read


def model_source(model: nn.Module, policy: Policy) -> Source:
    """Slices of a model the caller loaded, copied so that the whole tensors can be freed.

    It keeps no module, or none would be freed before the last is read; and it copies whole tensors too, since one view
    of a file that Transformers has mapped keeps all of its pages.
    """
    names = {policy.published(name): name for name, _ in model.named_modules()}

    def read(name: str, part: TensorSlice) -> Tensor:
        module, suffix = name.rsplit(".", 1)
        whole = getattr(model.get_submodule(names[module]), suffix).detach()
        if part.dim is None:
            return whole.clone()
        return torch.cat([whole.narrow(part.dim, a, b - a) for a, b in part.ranges], dim=part.dim)

    return read


def inject(model: nn.Module, plan: Plan, tp: Group, source: Source, dtype: torch.dtype) -> None:
    """Make `model` this rank's shard, in place. Raises UserError where the policy does not fit the model."""
    policy = plan.policy
    names = {policy.published(name): name for name, _ in model.named_modules()}
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    policy.check_claims((policy.published(name) for name in parameters), plan.geometry)
    switch = vision_data_parallel.attention_switch(model, plan, tp.rank) if plan.whole_encoder else None
    handled = 0  # bytes since what was freed went back to the system
    for module_name, claim in plan.claims.items():
        module = model.get_submodule(names[module_name])
        tensors: dict[str, Any]
        if plan.geometry.tied and f"{module_name}.weight" == policy.tied[0]:
            tensors = {"weight": model.get_submodule(names[policy.tied[1].rsplit(".", 1)[0]]).weight}
        else:
            tensors = {
                suffix: _on_cpu(source(f"{module_name}.{suffix}", plan.slice(module_name, suffix, tp.rank)), dtype)
                for suffix in claim.parameters()
            }
            tensors["weight"] = kernels.make_weight(tensors["weight"], plan.format_of(module_name))
        if isinstance(claim.rule, Replicated):
            for suffix, tensor in tensors.items():
                setattr(module, suffix, layers.frozen(tensor))
        else:
            parent, _, child = names[module_name].rpartition(".")
            weight, bias = tensors["weight"], tensors.get("bias")
            if switch and plan.in_encoder(module_name):
                part = plan.divided.slice(module_name, "weight", tp.rank)
                slots = _slots(plan.divided, claim, tp.rank)
                layer = vision_data_parallel.either(claim, part, tp, weight, bias, switch, slots)
            else:
                layer = BUILDERS[type(claim.rule)](plan, claim, tp, weight, bias)
            setattr(model.get_submodule(parent), child, layer)
            del weight, bias
        handled += sum(tensor.nbytes for tensor in tensors.values())
        del module, tensors
        if handled > GIVE_BACK_EVERY:
            malloc.give_back()
            handled = 0
    override_heads({policy.published(name): module for name, module in model.named_modules()}, plan,
                   {encoder: shards[tp.rank] for encoder, shards in plan.heads.items()})
    use_fast_attention(model, plan)
    fuse(model)
    if switch:
        vision_data_parallel.install(model, plan, tp, switch)
    _keep_frequencies(model)
    malloc.give_back()
    malloc.keep()
    _check_whole(model, plan, tp.rank)


def _on_cpu(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight.to("cpu", dtype) if isinstance(weight, Tensor) else weight


def _slots(plan: Plan, claim: Claim, rank: int) -> tuple[Tensor | None, int]:
    """Where this rank's head outputs go among the slots its attention believes in; (None, 0) where they fill them."""
    axis = claim.rule.axis(claim.weight)
    if axis not in plan.policy.head_axes:
        return None, 0
    encoder, kind = plan.policy.head_axes[axis]
    shard, parts = plan.heads[encoder][rank], claim.rule.parts
    if kind == "kv" or not shard.padded_q:
        assert kind == "q" or not shard.padded_kv, "a rank without KV heads needs a fused rule"
        return None, 0
    return layers.slot_index(shard.q_slots, shard.head_dim, parts, shard.width), parts * shard.width


def _column(plan: Plan, claim: Claim, tp: Group, weight: Weight, bias: Tensor | None) -> nn.Module:
    return layers.ColumnParallelLinear(weight, bias, *_slots(plan, claim, tp.rank))


def _row(plan: Plan, claim: Claim, tp: Group, weight: Weight, bias: Tensor | None) -> nn.Module:
    return layers.RowParallelLinear(weight, bias, tp, _slots(plan, claim, tp.rank)[0])


def _vocab(plan: Plan, claim: Claim, tp: Group, weight: Weight, bias: Tensor | None) -> nn.Module:
    split = plan.splits[claim.rule.axis(claim.weight)]
    return layers.VocabParallelEmbedding(weight, split.ranges[tp.rank], split.size, tp)


def _head(plan: Plan, claim: Claim, tp: Group, weight: Weight, bias: Tensor | None) -> nn.Module:
    split = plan.splits[claim.rule.axis(claim.weight)]
    head = layers.VocabParallelHead(weight, bias, tuple(b - a for a, b in split.ranges), tp)
    if isinstance(weight, nn.Parameter):
        head.weight = weight  # tied: the same parameter, not a copy
    return head


BUILDERS: dict[type[Rule], Callable[[Plan, Claim, Group, Weight, Tensor | None], nn.Module]] = {
    Column: _column, FusedQKV: _column, Row: _row, Vocab: _vocab, Head: _head,
}


def _keep_frequencies(model: nn.Module) -> None:
    """Float buffers (rotary frequencies) keep their dtype when DeepSpeed casts the model with `.bfloat16()`.

    Transformers keeps them in float32; rounded to bfloat16 they turn long-range positions by whole radians, silently.
    """
    for module in model.modules():
        if any(b is not None and b.is_floating_point() for b in module.buffers(recurse=False)):
            module._apply = _dtype_keeping_apply(module)  # type: ignore[method-assign]


def _dtype_keeping_apply(module: nn.Module) -> Callable[..., nn.Module]:
    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(module._buffers)
        type(module)._apply(module, fn, recurse)
        for name, old in before.items():
            new = module._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                module._buffers[name] = old.to(new.device)
        return module

    return apply


def _check_whole(model: nn.Module, plan: Plan, rank: int) -> None:
    """Our own promises: nothing is left on meta, and the shard is as large as the plan said."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never given a value: {left}"
    quantised = {id(w): w.nbytes for m in model.modules() if isinstance(w := getattr(m, "weight", None), Quantised)}
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(quantised.values())
    assert held == plan.weight_bytes(rank), (held, plan.weight_bytes(rank))
