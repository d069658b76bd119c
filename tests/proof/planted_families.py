"""Faults in what the families beside Qwen2-VL have and it has not, each planted alone into a sound shard."""

from __future__ import annotations

import torch
from planted import Fault, param

Q3, BLOCK3 = "model.language_model.layers.0.self_attn", "model.visual.blocks.0"
BLOCK25 = "visual.blocks.0"
DELTA, FULL = "model.language_model.layers.0.linear_attn", "model.language_model.layers.1.self_attn"
EXPERTS, ROUTER = "model.language_model.layers.0.mlp.experts", "model.language_model.layers.0.mlp.gate"


def norm_of_other_numbers(modules, plan, tp):
    norm = modules[f"{Q3}.q_norm"]
    norm.weight = param(norm.weight.roll(1, 0))


def norm_of_one_rank(modules, plan, tp):
    if tp.rank == 1:
        norm_of_other_numbers(modules, plan, tp)


def keys_not_normalised(modules, plan, tp):
    modules[f"{Q3}.k_norm"].forward = lambda x: x


def norm_over_all_heads(modules, plan, tp):
    """As OLMo normalises: over all heads of a rank together."""
    norm = modules[f"{Q3}.q_norm"]

    def over_all(x):
        flat = x.flatten(-2).float()
        return ((flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm.variance_epsilon)).view(x.shape)
                * norm.weight).to(x.dtype)
    norm.forward = over_all


def deepstack_in_the_wrong_layers(modules, plan, tp):
    encoder = modules["model.visual"]
    forward = encoder.forward

    def reversed_features(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.deepstack_features = out.deepstack_features[::-1]
        return out
    encoder.forward = reversed_features


def deepstack_gathered_shifted(modules, plan, tp):
    """The injected features of assigned images come a place late, the others are right."""
    parallel = modules["model.visual"].data_parallel
    gather = parallel.gather

    def shifted(assignment, features):
        first, *injected = gather(assignment, features).chunk(3, -1)
        return torch.cat([first, *injected[::-1]], -1)
    parallel.gather = shifted


def interpolated_from_another_place(modules, plan, tp):
    if tp.rank == 1:
        table = modules["model.visual.pos_embed"]
        table.weight = param(table.weight.roll(1, 0))


def window_cut_in_two(modules, plan, tp):
    attention = modules[f"{BLOCK25}.attn"]
    forward = attention.forward

    def halved(x, cu_seqlens, **kwargs):
        middle = (cu_seqlens[0] + cu_seqlens[1]) // 2
        return forward(x, cu_seqlens=torch.cat([cu_seqlens[:1], middle[None], cu_seqlens[1:]]), **kwargs)
    attention.forward = halved


def gate_and_up_swapped(modules, plan, tp):
    gate, up = modules[f"{BLOCK25}.mlp.gate_proj"], modules[f"{BLOCK25}.mlp.up_proj"]
    gate.weight, up.weight = up.weight, gate.weight


def experts_gate_and_up_swapped(modules, plan, tp):
    experts = modules[EXPERTS]
    gate, up = experts.gate_up_proj.chunk(2, 1)
    experts.gate_up_proj = param(torch.cat([up, gate], 1))


def experts_cut_contiguously(modules, plan, tp):
    """Rank 0 has the gates and rank 1 the others, both as halves of which they take one for the gate."""
    experts = modules[EXPERTS]
    widths = tuple(plan.slice(EXPERTS, "gate_up_proj", r).local_shape[1] for r in range(tp.size))
    parts = tp.all_gather_last(experts.gate_up_proj.transpose(1, 2).contiguous(), widths).split(widths, -1)
    gates, ups = zip(*(part.chunk(2, -1) for part in parts), strict=True)
    whole = torch.cat([*gates, *ups], -1).split(widths, -1)
    experts.gate_up_proj = param(whole[tp.rank].transpose(1, 2))


def experts_off_by_one(modules, plan, tp):
    experts = modules[EXPERTS]
    experts.gate_up_proj = param(experts.gate_up_proj.roll(1, 0))
    experts.down_proj = param(experts.down_proj.roll(1, 0))


def router_of_one_rank(modules, plan, tp):
    if tp.rank == 1:
        router = modules[ROUTER]
        router.weight = param(router.weight.roll(1, 0))


def experts_not_summed(modules, plan, tp):
    experts = modules[EXPERTS]
    experts.forward = experts.own


def convolution_shifted(modules, plan, tp):
    convolution = modules[f"{DELTA}.conv1d"]
    convolution.weight = param(convolution.weight.roll(1, 0))


def convolution_not_activated(modules, plan, tp):
    modules[DELTA].activation = None


def decay_of_another_head(modules, plan, tp):
    net = modules[DELTA]
    net.A_log = param(net.A_log.roll(1, 0))


def gates_for_queries(modules, plan, tp):
    """As if all queries came first, or each head's gate did."""
    layer = modules[f"{FULL}.q_proj"]
    head_dim = plan.geometry.attention["text"].head_dim
    layer.weight = param(layer.weight.unflatten(0, (-1, 2, head_dim)).flip(1).flatten(0, 2))


def delta_net_cut_contiguously(modules, plan, tp):
    """A third of q | k | v, none of whose parts is a third, for each rank in turn."""
    name, layer = f"{DELTA}.in_proj_qkv", modules[f"{DELTA}.in_proj_qkv"]
    parts = [plan.slice(name, "weight", r) for r in range(tp.size)]
    widths = tuple(part.local_shape[0] for part in parts)
    whole = torch.zeros(parts[0].shape)
    every = tp.all_gather_last(layer.weight.T.contiguous(), widths).T.split(widths)
    for part, held in zip(parts, every, strict=True):
        for (start, stop), rows in zip(part.ranges, held.split([b - a for a, b in part.ranges]), strict=True):
            whole[start:stop] = rows
    layer.weight = param(whole.split(widths)[tp.rank])


def gated_norm_of_one_rank(modules, plan, tp):
    if tp.rank == 1:
        norm = modules[f"{DELTA}.norm"]
        norm.weight = param(norm.weight.roll(1, 0))


FAMILY_FAULTS: dict[str, dict[str, Fault]] = {
    "qwen2_5_vl": {
        "a window cut in two": Fault(window_cut_in_two, f"{BLOCK25}.attn", at_start=True),
        "gate and up swapped": Fault(gate_and_up_swapped, f"{BLOCK25}.mlp.gate_proj", tensors=True),
    },
    "qwen3_vl": {
        "a norm of other numbers": Fault(norm_of_other_numbers, f"{Q3}.q_norm", tensors=True),
        "a norm of one rank": Fault(norm_of_one_rank, f"{Q3}.q_norm", tensors=True, at_start=True),
        "keys not normalised": Fault(keys_not_normalised, f"{Q3}.k_norm", at_start=True),
        "a norm over all heads": Fault(norm_over_all_heads, f"{Q3}.q_norm", at_start=True),
        "DeepStack in the wrong layers": Fault(deepstack_in_the_wrong_layers, "model.visual"),
        "DeepStack gathered in another order": Fault(deepstack_gathered_shifted, "model.visual", vision="data",
                                                     pictures=2),
        "a table of one rank": Fault(interpolated_from_another_place, "model.visual.pos_embed", tensors=True,
                                     ranks=(1,)),
    },
    "qwen3_vl_moe": {
        "experts' gate and up swapped": Fault(experts_gate_and_up_swapped, EXPERTS, tensors=True),
        "experts cut contiguously": Fault(experts_cut_contiguously, EXPERTS, tensors=True),
        "an expert off by one": Fault(experts_off_by_one, EXPERTS, tensors=True),
        "experts that are not summed": Fault(experts_not_summed, EXPERTS, at_start=True),
        "a router of one rank": Fault(router_of_one_rank, ROUTER, tensors=True, at_start=True, ranks=(1,)),
    },
    "qwen3_5": {
        "a convolution's channels shifted": Fault(convolution_shifted, DELTA, tensors=True),
        "a convolution without its activation": Fault(convolution_not_activated, DELTA, at_start=True),
        "A_log of another head": Fault(decay_of_another_head, DELTA, tensors=True),
        "gates taken for queries": Fault(gates_for_queries, f"{FULL}.q_proj", tensors=True),
        "a delta net cut contiguously": Fault(delta_net_cut_contiguously, f"{DELTA}.in_proj_qkv", tensors=True),
        "a gated norm of one rank": Fault(gated_norm_of_one_rank, f"{DELTA}.norm", tensors=True, at_start=True),
    },
}
