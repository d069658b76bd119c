"""Make a model this rank's shard: parallel layers in place of whole ones, filled from a checkpoint or the model itself.

One walk over the plan's modules, in the table's order: read this rank's slice, move it to the device, build the layer,
replace the whole module, which is freed. Peak memory is the shard so far plus one tensor, whether the model was built
on `meta` or loaded before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from adapter.model.attention import CpuAttention, override_heads
from adapter.model.published import PublishedModules
from adapter.model.vision_data_parallel import EncoderMode
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from policies.policy import Policy
from policies.rules import (
    Claim,
    Column,
    Experts,
    Fused,
    FusedQKV,
    Head,
    InPlace,
    Replicated,
    Row,
    Rule,
    TensorSlice,
    Vocab,
)

GIVE_BACK_EVERY = 32 << 20  # bytes of loaded weights between two calls that return freed memory to the system
Source = Callable[[str, TensorSlice], Weight]


def checkpoint_source(checkpoint: Checkpoint | Shards, rank: int) -> Source:
    """Slices read from files, tensor by tensor; a file of shards is mapped once."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.read
    held = checkpoint.load(rank)

    def read(name: str, part: TensorSlice) -> Weight:
        assert held[name].shape == part.local_shape, (name, held[name].shape, part)
        return held.pop(name)

    return read


def model_source(model: nn.Module, policy: Policy) -> Source:
    """Slices of a model the caller loaded, copied so that the whole tensors can be freed.

    Whole tensors are copied too: one view of a file that Transformers has mapped keeps all of its pages.
    """
    modules = PublishedModules(model, policy)

    def read(name: str, part: TensorSlice) -> Tensor:
        module, suffix = name.rsplit(".", 1)
        whole = getattr(modules[module], suffix).detach()
        if part.dim is None:
            return whole.clone()
        return torch.cat([whole.narrow(part.dim, a, b - a) for a, b in part.ranges], dim=part.dim)

    return read


def inject(model: nn.Module, plan: Plan, tp: Group, source: Source, dtype: torch.dtype, device: str = "cpu") -> None:
    """Make `model` this rank's shard, in place, its weights in `dtype` on `device`.

    Raises UserError where the policy does not fit the model.
    """
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    plan.policy.check_claims((plan.policy.published(name) for name in parameters), plan.geometry)
    modules = PublishedModules(model, plan.policy)
    mode = EncoderMode(modules, plan, tp.rank) if plan.whole_encoder else None
    load_weights(modules, plan, tp, source, dtype, device, mode)
    override_heads(modules, plan, {encoder: shards[tp.rank] for encoder, shards in plan.heads.items()})
    if device == "cpu":
        CpuAttention(modules, plan).apply()
        fuse(model)
    if mode:
        vision_data_parallel.install(modules, plan, tp, mode)
    _keep_frequencies(model)
    _check_whole(model, plan, tp.rank)


def load_weights(modules: PublishedModules, plan: Plan, tp: Group, source: Source, dtype: torch.dtype, device: str,
                 mode: EncoderMode | None) -> None:
    """Replace every claimed module by its parallel layer, or its parameters where they are replicated.

    Each tensor goes to `device` as soon as it is read: the host holds one at a time beside what stays there.
    """
    loaded = 0  # bytes since freed memory was last returned to the system
    for name, claim in plan.claims.items():
        tensors = _load_module(modules, plan, tp.rank, source, dtype, device, name)
        loaded += sum(tensor.nbytes for tensor in tensors.values())
        _replace(modules, plan, tp, name, claim, tensors, mode)
        del tensors
        if loaded > GIVE_BACK_EVERY:
            malloc.give_back()
            loaded = 0
    malloc.give_back()


def _load_module(modules: PublishedModules, plan: Plan, rank: int, source: Source, dtype: torch.dtype, device: str,
                 name: str) -> dict[str, Any]:
    """This rank's slices of a module's parameters: suffix -> tensor; the tied head's weight is the embedding's."""
    if plan.is_tied_copy(name, "weight"):
        return {"weight": modules[plan.policy.tied[1].rsplit(".", 1)[0]].weight}
    tensors = dict[str, Any]()
    for suffix in plan.claims[name].parameters():
        part = plan.slice(name, suffix, rank)
        tensors[suffix] = _moved(source(f"{name}.{suffix}", part), dtype, device)
    if "weight" in tensors:
        tensors["weight"] = kernels.make_weight(tensors["weight"], plan.format_of(name))
    return tensors


def _moved(weight: Weight, dtype: torch.dtype, device: str) -> Weight:
    return weight.to(device, dtype) if isinstance(weight, Tensor) else weight


def _replace(modules: PublishedModules, plan: Plan, tp: Group, name: str, claim: Claim, tensors: Mapping[str, Any],
             mode: EncoderMode | None) -> None:
    """Put a module's slices into the model: as new parameters, or in a parallel layer in the module's place."""
    if isinstance(claim.rule, Replicated | InPlace):
        for suffix, tensor in tensors.items():
            owner, parameter = modules.owner(name, suffix)
            setattr(owner, parameter, layers.frozen(tensor))
        return
    if isinstance(claim.rule, Experts):
        modules.replace(name, _experts(plan, claim, tp, name, tensors, modules[name]))
        return
    weight, bias = tensors["weight"], tensors.get("bias")
    if mode and plan.in_encoder(name):
        part = plan.divided.slice(name, "weight", tp.rank)
        slots = _slots(plan.divided, claim, tp.rank)
        layer = vision_data_parallel.switchable(claim, part, tp, weight, bias, mode, slots)
    else:
        layer = BUILDERS[type(claim.rule)](plan, claim, tp, weight, bias)
    modules.replace(name, layer)


def _slots(plan: Plan, claim: Claim, rank: int) -> tuple[Tensor | None, int]:
    """The places of this rank's head outputs among the slots that its attention module is given, and their width.

    (None, 0) where they fill all slots.
    """
    cut, places, width = claim.rule.cut("weight", claim.parameters()), list[Tensor](), 0
    assert cut is not None
    for axis in cut.axes:
        if axis not in plan.policy.head_axes:
            return None, 0
        encoder, kind = plan.policy.head_axes[axis]
        shard, rows = plan.heads[encoder][rank], plan.policy.rows_of_a_head(axis, plan.geometry)
        if kind == "kv" or not shard.padded_q:
            assert kind == "q" or not shard.padded_kv, "a rank without KV heads needs a fused rule"
            return None, 0
        places.append(width + layers.slot_index(shard.q_slots, rows))
        width += shard.slots * rows
    return torch.cat(places), width


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


def _experts(plan: Plan, claim: Claim, tp: Group, name: str, tensors: Mapping[str, Any], whole: Any) -> nn.Module:
    (gate_up_proj, down_proj), first = tensors.values(), 0
    if isinstance(claim.rule, Experts) and claim.rule.by == "expert":
        first = plan.slice(name, next(iter(tensors)), tp.rank).ranges[0][0]
    return layers.ParallelExperts(gate_up_proj, down_proj, first, whole.act_fn, tp)


BUILDERS: dict[type[Rule], Callable[[Plan, Claim, Group, Weight, Tensor | None], nn.Module]] = {
    Column: _column, Fused: _column, FusedQKV: _column, Row: _row, Vocab: _vocab, Head: _head,
}


def _keep_frequencies(model: nn.Module) -> None:
    """Make float buffers (rotary frequencies) keep their dtype when DeepSpeed casts the model with `.bfloat16()`.

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
    """Assert that nothing is left on `meta`, and that the shard is as large as the plan says."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never given a value: {left}"
    quantised = {id(w): w.nbytes for m in model.modules() if isinstance(w := getattr(m, "weight", None), Quantised)}
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(quantised.values())
    assert held == plan.weight_bytes(rank), (held, plan.weight_bytes(rank))
