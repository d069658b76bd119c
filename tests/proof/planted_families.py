"""Faults in what the families beside Qwen2-VL have and it has not, each planted alone into a sound shard."""

from __future__ import annotations

import torch
from planted import Fault, param

Q3, BLOCK3 = "model.language_model.layers.0.self_attn", "model.visual.blocks.0"
BLOCK25 = "visual.blocks.0"


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
}
