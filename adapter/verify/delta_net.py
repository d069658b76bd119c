"""How far two correct computations of a gated delta rule may differ, given the same linear layers before it.

Of one value head, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t / sqrt(D), with unit vectors
k and q, 0 < a, b <= 1: no step expands an error of the state, so errors add, each with the decay since (Yang, Kautz,
Hatamizadeh: Gated Delta Networks, 2024). S is computed here, token by token; with n = |a_t S_{t-1}| and w = |v_t - a_t
S_{t-1} k_t|, to first order in the roundings, in norms of a whole head:

    e_t = a_t e_{t-1} + da n + b dv + b (w + n) dk + db w + r ((C + 2) b w + n)
    |o_t off| <= (e_t + |S_t| (dq + r)) / sqrt(D)

dq, dk, dv: what the convolution's roundings do to a head, relative to its length for the first two; da relative, db
not. The last term is rounding: in chunks of C tokens a unit triangular system is solved, whose entries and those of its
inverse are at most 1, so each of its solutions b w counts C + 2 times, with r = 2 * 8 * sqrt(D + C) * u32 for each sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    (_, dq), (k, dk), (v, dv) = _heads(mixed, off, parts, dim, values)
    beta, u = numbers["beta"].float().sigmoid(), bounds.unit_roundoff(numbers["beta"].dtype)
    log_decay = -own[net.log_decay].float().exp() * F.softplus(numbers["decay"].float() + own[net.bias].float())
    chunk = min(CHUNK, beta.shape[1])
    da = 2 * bounds.long_sum(chunk) * (1 + chunk * log_decay.abs().amax(1, keepdim=True)).expand_as(beta)
    r = 2 * bounds.long_sum(dim + chunk)
    state, error, found = v.new_zeros(*v[:, 0].shape, dim), torch.zeros_like(beta[:, 0]), []
    for t in range(beta.shape[1]):
        a, b, to = log_decay[:, t].exp(), beta[:, t], k[:, t, :, :, None]
        state = a[..., None, None] * state
        n, new = state.flatten(-2).norm(dim=-1), v[:, t] - (state @ to).squeeze(-1)
        w = new.norm(dim=-1)
        error = a * error + da[:, t] * n + b * dv[:, t] + b * (w + n) * dk[:, t] + 4 * u * b * w
        error = error + r * ((chunk + 2) * b * w + n)
        state = state + (b[..., None] * new)[..., None] * to.mT
        found.append((error + state.flatten(-2).norm(dim=-1) * (dq[:, t] + r)) / dim ** 0.5)
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


def _heads(mixed: Tensor, off: Tensor, parts: tuple[int, ...], dim: int,
           values: int) -> Iterator[tuple[Tensor, Tensor]]:
    """q, k and v of each value head, [B, S, value heads, dim], the first two of unit length, and how far each head
    [B, S, value heads] may be off."""
    q, k, v = zip(mixed.split(parts, -1), off.split(parts, -1), strict=True)
    for x, error in (q, k):
        heads = x.unflatten(-1, (-1, dim))
        length = (heads.square().sum(-1) + EPSILON).sqrt()
        share = 2 * error.unflatten(-1, (-1, dim)).norm(dim=-1) / length + 2 * bounds.long_sum(dim)
        each = values // heads.shape[2]
        yield ((heads / length[..., None]).repeat_interleave(each, 2), share.clamp_max(2.0).repeat_interleave(each, 2))
    yield v[0].unflatten(-1, (values, -1)), v[1].unflatten(-1, (values, -1)).norm(dim=-1)
