"""How far two correct computations of a gated delta rule may differ, given the same linear layers before it.

Of one value head, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t / sqrt(D), with unit vectors
k and q, 0 < a, b <= 1: no step expands an error of the state, so errors add, each with the decay since (Yang, Kautz,
Hatamizadeh: Gated Delta Networks, 2024). To first order in the roundings, in norms of a whole head:

    n_t = a_t n_{t-1} + b_t |v_t|                                      no less than |S_t|
    e_t = a_t e_{t-1} + a_t n_{t-1} (db + 2 b dk + da) + b (dv + |v| (dk + db / b)) + rounding
    |o_t off| <= (e_t + n_t (dq + r)) / sqrt(D)

dq, dk, dv: what the convolution's roundings do to a head, relative to its length for the first two. Rounding: in chunks
of C tokens a unit triangular system is solved, whose entries and those of its inverse are at most 1, so each of the
steps b (|v| + a n) counts C + 2 times, with r = 2 * 8 * sqrt(D + C) * u32 for each sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter.planning.plan import Plan
from adapter.verify import bounds
from policies.policy import DeltaNet

CHUNK = 64  # tokens; the most that Transformers computes together
EPSILON = 1e-6  # under the root of the lengths of q and k


def bound(plan: Plan, net: DeltaNet, numbers: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    """float32 [B, S, value heads]: how far each number of a head's output may be off, before it is rounded.

    numbers: of all heads, in the model's dtype: "qkv" [B, S, 2 keys + values], "beta", "decay" [B, S, value heads].
    own: the module's parameters, whole, by their names in the table.
    """
    sizes, heads = plan.geometry.sizes, plan.geometry.attention[net.heads]
    parts = (sizes[net.key], sizes[net.key], sizes[net.value])
    mixed, off = _convolved(numbers["qkv"], own[net.convolution])
    values, dim = sizes[net.value_heads], heads.head_dim
    (dq, dk), (v, dv) = _directions(mixed, off, parts, dim, values), _lengths(mixed, off, parts, values)
    beta, u = numbers["beta"].float().sigmoid(), bounds.unit_roundoff(numbers["beta"].dtype)
    log_decay = -own[net.log_decay].float().exp() * F.softplus(numbers["decay"].float() + own[net.bias].float())
    chunk = min(CHUNK, beta.shape[1])
    da = 2 * bounds.long_sum(chunk) * (1 + chunk * log_decay.abs().amax(1, keepdim=True)).expand_as(beta)
    r = 2 * bounds.long_sum(dim + chunk)
    state, error, found = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), []
    for t in range(beta.shape[1]):
        b, kept = beta[:, t], log_decay[:, t].exp() * state
        db = 4 * u * b
        error = log_decay[:, t].exp() * error + kept * (db + 2 * b * dk[:, t] + da[:, t])
        error = error + b * dv[:, t] + v[:, t] * (b * dk[:, t] + db) + r * ((chunk + 2) * b * (v[:, t] + kept) + kept)
        state = kept + b * v[:, t]
        found.append((error + state * (dq[:, t] + r)) / dim ** 0.5)
    return torch.stack(found, 1)


def _convolved(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The causal convolution of x [B, S, C] and its activation, in float32, and how far each number may be off.
    weight: [C, 1, width]."""
    width, dtype = weight.shape[-1], x.dtype

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        out = F.conv1d(x.transpose(1, 2), weight, padding=width - 1, groups=len(weight))
        return out[..., :x.shape[1]].transpose(1, 2)

    y = convolve(x.float(), weight.float())
    off = bounds.linear(convolve(x.float().abs(), weight.float().abs()), y.abs(), width, dtype, 1)
    activated = F.silu(y)
    return activated, bounds.STEEPEST * off + bounds.elementwise(activated.to(dtype))


def _directions(mixed: Tensor, off: Tensor, parts: tuple[int, ...], dim: int, values: int) -> tuple[Tensor, ...]:
    """What is off of the unit vectors of q and of k, [B, S, value heads] each."""
    found = []
    for x, error in list(zip(mixed.split(parts, -1), off.split(parts, -1), strict=True))[:2]:
        length = (x.unflatten(-1, (-1, dim)).square().sum(-1) + EPSILON).sqrt()
        share = 2 * error.unflatten(-1, (-1, dim)).norm(dim=-1) / length + 2 * bounds.long_sum(dim)
        found.append(share.clamp_max(2.0).repeat_interleave(values // share.shape[-1], -1))
    return tuple(found)


def _lengths(mixed: Tensor, off: Tensor, parts: tuple[int, ...], values: int) -> tuple[Tensor, Tensor]:
    """The length of each value head's v, and how far v may be off."""
    v, error = (t.split(parts, -1)[2].unflatten(-1, (values, -1)).norm(dim=-1) for t in (mixed, off))
    return v, error
