"""Sharding bugs, each planted alone into a sound shard: what engines have shipped, and what nearly was.

A fault is a function of (modules by published name, plan, tp) that changes this rank's model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Modules = Mapping[str, Any]
Plant = Callable[[Modules, Any, Any], None]
ENCODER, ATTN, MLP, BLOCK = "model.visual", "model.layers.0.self_attn", "model.layers.0.mlp", "visual.blocks.0"


@dataclass(frozen=True)
class Fault:
    """module: what verify must name; None for a fault that lives in none, then `says` is in its problems.
    at_start: whether it lies where the self-test looks; tensors: whether the shards differ from the files."""

    plant: Plant
    module: str | None
    says: str = ""
    at_start: bool = False
    tensors: bool = False
    ranks: tuple[int, ...] | None = None  # those verify must name, where it can
    vision: str = "tensor"  # of the engine it is planted into
    pictures: int = 1  # asked about, of one size


def param(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def whole_bias(modules: Modules, plan: Any, tp: Any, name: str) -> torch.Tensor:
    """A column-parallel bias put together from all ranks, in file order."""
    parts = [plan.slice(name, "bias", r) for r in range(tp.size)]
    sizes = tuple(p.local_shape[0] for p in parts)
    pieces = tp.all_gather_last(modules[name].bias.detach().clone(), sizes).split(sizes)
    whole = torch.zeros(parts[0].shape)
    for part, values in zip(parts, pieces, strict=True):
        at = 0
        for a, b in part.ranges:
            whole[a:b] = values[at:at + b - a]
            at += b - a
    return whole


def bias_cut_contiguously(modules, plan, tp):
    layer = modules[f"{BLOCK}.attn.qkv"]
    n = layer.bias.numel()
    layer.bias = param(whole_bias(modules, plan, tp, f"{BLOCK}.attn.qkv")[tp.rank * n:(tp.rank + 1) * n])


def bias_on_every_rank(modules, plan, tp):
    layer = modules[f"{BLOCK}.attn.proj"]
    layer.forward = lambda x: tp.all_reduce(F.linear(
        x if layer.slots is None else x.index_select(-1, layer.slots), layer.weight, layer.bias))


def bias_elements_repeated(modules, plan, tp):
    layer = modules[f"{ATTN}.k_proj"]
    layer.bias = param(layer.bias[: layer.bias.numel() // 2].repeat_interleave(2))


def q_and_k_swapped(modules, plan, tp):
    layer = modules["visual.blocks.1.attn.qkv"]
    q, k, v = layer.weight.chunk(3)
    layer.weight = param(torch.cat([k, q, v]))


def kv_head_of_the_wrong_group(modules, plan, tp):
    d = plan.heads["text"][tp.rank].head_dim
    for layer in (modules[f"{ATTN}.k_proj"], modules[f"{ATTN}.v_proj"]):
        layer.weight, layer.bias = param(layer.weight.roll(d, 0)), param(layer.bias.roll(d, 0))


def off_by_one_boundary(modules, plan, tp):
    if tp.rank == tp.size - 1:
        layer = modules["model.layers.1.mlp.gate_proj"]
        layer.weight = param(layer.weight.roll(-1, 0))


def off_by_one_inputs(modules, plan, tp):
    if tp.rank == 0:
        layer = modules["model.layers.1.mlp.down_proj"]
        layer.weight = param(layer.weight.roll(1, 1))


def missing_all_reduce(name):
    def plant(modules, plan, tp):
        layer = modules[name]
        layer.forward = lambda x: F.linear(x if layer.slots is None else x.index_select(-1, layer.slots), layer.weight,
                                           layer.bias)
    return plant


def half_precision_all_reduce(modules, plan, tp):
    layer = modules["model.layers.2.mlp.down_proj"]
    layer.forward = lambda x: tp.all_reduce(F.linear(x, layer.weight).bfloat16()).to(x.dtype)


def vocab_offset(modules, plan, tp):
    if tp.rank == 1:
        layer = modules["model.embed_tokens"]
        layer.owned = (layer.owned[0] - 1, layer.owned[1] - 1)


def rotary_sections(modules, plan, tp):
    modules["model.rotary_emb"].mrope_section = modules["model.rotary_emb"].mrope_section[::-1]


def stale_frequencies(name):
    def plant(modules, plan, tp):
        rotary = modules[name]
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    return plant


def merger_order(modules, plan, tp):
    merger = modules["visual.merger"]
    forward = merger.forward
    merger.forward = lambda x: forward(x.unflatten(0, (-1, 4)).flip(1).flatten(0, 1))


def untied_head(modules, plan, tp):
    head = modules["lm_head"]
    head.weight = param(head.weight + 0.01 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))


def rank_order(modules, plan, tp):
    head = modules["lm_head"]
    sizes = head.sizes

    def forward(x):
        parts = tp.all_gather_last(F.linear(x, head.weight), sizes).split(sizes, -1)
        return torch.cat(parts[::-1], -1)
    head.forward = forward


def shards_of_each_other(modules, plan, tp):
    layer = modules["visual.blocks.2.mlp.fc1"]
    every = tp.all_gather_last(layer.weight.detach().t().contiguous(), (layer.weight.shape[0],) * tp.size)
    layer.weight = param(every.t().split(layer.weight.shape[0])[(tp.rank + 1) % tp.size])


def one_ranks_features(modules, plan, tp):
    encoder = modules["model.visual"]
    forward = encoder.forward

    def other(*args, **kwargs):
        out = forward(*args, **kwargs)
        features = out if isinstance(out, torch.Tensor) else out.pooler_output
        if tp.rank == 1:
            features.mul_(1.001)
        return out
    encoder.forward = other


def one_ranks_norm(modules, plan, tp):
    if tp.rank == 1:
        norm = modules["model.layers.1.input_layernorm"]
        norm.weight = param(norm.weight.bfloat16().float() * 1.0001)


def random_numbers(modules, plan, tp):
    """On rank 1 every draw of a token starts from another seed, whatever was agreed."""
    draw = torch.multinomial

    def other(*args, **kwargs):
        torch.manual_seed(int(torch.randint(2**31, (1,))) + tp.rank)
        return draw(*args, **kwargs)
    torch.multinomial = other
    modules[""].undo = lambda: setattr(torch, "multinomial", draw)


def heads_in_the_wrong_slots(modules, plan, tp):
    """The rank whose query heads straddle KV groups puts them into its slots from the wrong end."""
    for name in ("q_proj", "o_proj"):
        layer = modules[f"{ATTN}.{name}"]
        if layer.slots is not None:
            shard = plan.heads["text"][tp.rank]
            layer.slots = layer.slots + (shard.width - 1 - int(layer.slots.max()))


def softmax_scale(name):
    def plant(modules, plan, tp):
        modules[name].scaling *= (1 / tp.size) ** 0.5
    return plant


def picture_lengths(modules, plan, tp):
    """The patches of a picture attend to their half of it."""
    attention = modules[f"{BLOCK}.attn"]
    forward = attention.forward

    def halved(x, cu_seqlens, **kwargs):
        return forward(x, cu_seqlens=cu_seqlens.new_tensor([0, len(x) // 2, len(x)]), **kwargs)
    attention.forward = halved


def residual_twice(modules, plan, tp):
    layer = modules["model.layers.1"]
    forward = layer.forward

    def twice(x, *args, **kwargs):
        out = forward(x, *args, **kwargs)
        return (out[0] + x, *out[1:]) if isinstance(out, tuple) else out + x
    layer.forward = twice


def one_ranks_residual(modules, plan, tp):
    """Rank 1 alone forgets the first residual: what the block hands on differs there, in no layer with weights."""
    layer = modules["model.layers.1"]
    norm = layer.post_attention_layernorm

    def forget(module, args):
        return (args[0] * 0.5,) if tp.rank == 1 else None
    norm.register_forward_pre_hook(forget)


def other_activation(modules, plan, tp):
    modules["visual.blocks.1.mlp"].act = nn.GELU()


def no_causal_mask(modules, plan, tp):
    modules[f"{ATTN}"].is_causal = False


def late_positions_when_decoding(modules, plan, tp):
    """Only after the prompt, so that no single forward shows it."""
    rotary = modules["model.rotary_emb"]
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, position_ids + int(position_ids.min() > 0))


def patch_embedding_of_one_rank(modules, plan, tp):
    if tp.rank == 1:
        modules["visual.patch_embed.proj"].weight.data.mul_(1.01)


def picture_features_shifted(modules, plan, tp):
    def shifted(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            kwargs = kwargs | {"inputs_embeds": kwargs["inputs_embeds"].roll(1, 1)}
        return args, kwargs
    modules["model.language_model"].register_forward_pre_hook(shifted, with_kwargs=True)


def gathered_in_another_order(modules, plan, tp):
    parallel = modules[ENCODER].data_parallel
    gather = parallel.gather
    parallel.gather = lambda assignment, features: torch.cat(gather(assignment, features).chunk(2)[::-1])


def another_ranks_picture(modules, plan, tp):
    """Rank 1 reads the picture that was assigned to rank 0."""
    parallel = modules[ENCODER].data_parallel
    if tp.rank == 1:
        parallel.read = lambda assignment, patches, grid: (patches[:assignment.patches(0)], grid[:1])


def one_ranks_picture_late(modules, plan, tp):
    """Rank 1 is a patch late in its own picture, and nothing tells it from another in shape."""
    parallel = modules[ENCODER].data_parallel
    read = parallel.read
    if tp.rank == 1:
        parallel.read = lambda *args: (read(*args)[0].roll(1, 0), read(*args)[1])


def one_ranks_encoder(modules, plan, tp):
    if tp.rank == 1:
        modules["visual.blocks.1.mlp.fc1"].weight.data.mul_(1.01)


def part_of_another_rank(modules, plan, tp):
    """Ranges of a whole fused weight: k is taken where q is."""
    layer = modules[f"{BLOCK}.attn.qkv"]
    layer.ranges = (layer.ranges[1], layer.ranges[0], layer.ranges[2])


def part_and_whole_bias(modules, plan, tp):
    """Of a whole row-parallel layer that runs split, the bias goes into every rank's sum."""
    layer = modules[f"{BLOCK}.attn.proj"]
    layer.own = lambda x: F.linear(x, layer.weight[:, slice(*layer.owned)], layer.bias)


FAULTS: dict[str, Fault] = {
    "fused bias cut contiguously": Fault(bias_cut_contiguously, f"{BLOCK}.attn.qkv", tensors=True),
    "row-parallel bias on every rank": Fault(bias_on_every_rank, f"{BLOCK}.attn.proj", at_start=True),
    "bias elements repeated": Fault(bias_elements_repeated, f"{ATTN}.k_proj", tensors=True),
    "q and k swapped": Fault(q_and_k_swapped, "visual.blocks.1.attn.qkv", tensors=True),
    "KV head of the wrong group": Fault(kv_head_of_the_wrong_group, f"{ATTN}.k_proj", tensors=True),
    "off-by-one boundary, outputs": Fault(off_by_one_boundary, "model.layers.1.mlp.gate_proj", tensors=True,
                                          ranks=(1,)),
    "off-by-one boundary, inputs": Fault(off_by_one_inputs, "model.layers.1.mlp.down_proj", tensors=True),
    "no all-reduce after attention": Fault(missing_all_reduce(f"{ATTN}.o_proj"), f"{ATTN}.o_proj", at_start=True),
    "no all-reduce after an MLP": Fault(missing_all_reduce(f"{BLOCK}.mlp.fc2"), f"{BLOCK}.mlp.fc2", at_start=True),
    "all-reduce in half precision": Fault(half_precision_all_reduce, "model.layers.2.mlp.down_proj"),
    "vocabulary offset": Fault(vocab_offset, "model.embed_tokens"),
    "wrong rotary sections": Fault(rotary_sections, "model.rotary_emb"),
    "rounded rotary frequencies, text": Fault(stale_frequencies("model.rotary_emb"), "model.rotary_emb"),
    "rounded rotary frequencies, vision": Fault(stale_frequencies("visual.rotary_pos_emb"), "visual.rotary_pos_emb"),
    "merger order": Fault(merger_order, "visual.merger"),
    "untied head": Fault(untied_head, "lm_head", tensors=True),
    "wrong rank order in a gather": Fault(rank_order, "lm_head"),
    "shards of each other": Fault(shards_of_each_other, "visual.blocks.2.mlp.fc1", tensors=True),
    "one rank's picture features": Fault(one_ranks_features, "model.visual", ranks=(1,)),
    "one rank's norm": Fault(one_ranks_norm, "model.layers.1.input_layernorm", tensors=True, ranks=(1,)),
    "one rank's patch embedding": Fault(patch_embedding_of_one_rank, "visual.patch_embed.proj", tensors=True,
                                        ranks=(1,)),
    "one rank's random numbers": Fault(random_numbers, None, says="sampled tokens differ on rank 1"),
    "query heads in the wrong slots": Fault(heads_in_the_wrong_slots, ATTN, at_start=True),
    "softmax scale of a shard": Fault(softmax_scale(ATTN), ATTN, at_start=True),
    "pictures cut in two": Fault(picture_lengths, f"{BLOCK}.attn", at_start=True),
    "residual added twice": Fault(residual_twice, "model.layers.1"),
    "one rank's residual": Fault(one_ranks_residual, "model.layers.1", ranks=(1,)),
    "another activation": Fault(other_activation, "visual.blocks.1.mlp"),
    "no causal mask": Fault(no_causal_mask, ATTN),
    "picture features shifted": Fault(picture_features_shifted, "model"),
    "assigned pictures gathered in another order": Fault(gathered_in_another_order, ENCODER, vision="data", pictures=2,
                                                      ranks=(0, 1)),
    "another rank's picture": Fault(another_ranks_picture, ENCODER, vision="data", pictures=2, ranks=(1,)),
    "one rank's picture a patch late": Fault(one_ranks_picture_late, ENCODER, vision="auto", pictures=2, ranks=(1,)),
    "one rank's whole encoder": Fault(one_ranks_encoder, "visual.blocks.1.mlp.fc1", vision="data", pictures=2,
                                      tensors=True, ranks=(1,)),
    "softmax scale of a whole encoder": Fault(softmax_scale(f"{BLOCK}.attn"), f"{BLOCK}.attn", vision="data",
                                            pictures=2, at_start=True),
    "parts of a whole encoder in another order": Fault(part_of_another_rank, f"{BLOCK}.attn.qkv", vision="auto",
                                                     at_start=True),
    "row-parallel bias on every rank of a whole encoder": Fault(part_and_whole_bias, f"{BLOCK}.attn.proj",
                                                              vision="auto", at_start=True),
    "positions one late when decoding": Fault(late_positions_when_decoding, None, says="decoding token by token"),
}
IN_BFLOAT16 = ("row-parallel bias on every rank", "no all-reduce after attention", "softmax scale of a shard",
               "another activation", "residual added twice", "no causal mask", "merger order")
STRADDLING = {"query heads in the wrong slots"}  # need a rank across two KV groups: 28/4 heads over three ranks
