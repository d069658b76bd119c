"""How far two correct computations of the same thing may differ: forward bounds of rounding error, element by element.

Nothing here is tuned. u is the unit roundoff of the dtype that is named, half its eps. Long sums use the probabilistic
bound of Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis" (SIAM J. Sci. Comput. 41(5), 2019,
theorem 3.1): a sum of n products differs from the exact one by at most lambda * sqrt(n) * u * sum|terms|, except with a
probability below 2 n exp(-lambda^2 / 2), which lambda = 8 puts at 3e-14 n. Short chains of roundings are just counted.
Both sides err, so every bound is twice one side's. Sums accumulate in float32, which adapter.verify.precision sees to
where torch's default on CUDA is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAMBDA = 8.0
STEEPEST = 1.1  # slope of SiLU: 1.0998 at 2.4
ROUNDINGS = 8  # the longest chain of operations on one element between two layers with weights: gate and activation
STATEMENT = (
    "A linear layer over N ranks may differ from one process by 2 * 8 * sqrt(K) * u32 * (||W_i|| ||x|| + |b|) for "
    "its sums of K products in float32, and by (N + 1) * u * (sum over ranks of |W_r x_r| + |b|) for the roundings "
    "to the dtype: N partial sums, N - 1 additions, one bias (2 * u * |y| where nothing is reduced). Attention, "
    "given the same q, k and v, by eta * softmax(s) |v|, eta = 2 * (exp(2 ds) - 1 + 16 * sqrt(keys) * u32 + 8 * u32 "
    "+ 2 * u), ds = 8 * sqrt(head_dim) * u32 * max|q| max|k| / sqrt(head_dim), 2 * u added to its 8 * "
    "sqrt(head_dim) * u32 where scores are rounded to the dtype (eager). Norms by 48 * sqrt(n) * u32 * (|y| + |b| + "
    "|w| mean|x| / std x) + 4 * u * (|y| + |b|), without the mean and b in RMSNorm. Gates and activations by 8 * u "
    "* |y| + 4 * u32 * the largest of the row. Experts by what the bounds of gate and up become in the activation (its "
    "slope is at most 1.1), the product and |down|, and by (2 k + N + 3) * u * the sum of k experts' terms in "
    "magnitude. The recurrence of a gated delta rule, given the same q, k, v, beta and decay, by what roundings of its "
    "convolution, sums and decays become in a state that no step expands (adapter.verify.delta_net). "
    "Residuals, masks, look-ups, positions, rotary tables and where image features go by nothing. Where "
    "weights are codes of 8 or 4 bits, at most 16 rows of x are rounded to 8 bits: sum over groups of 64 inputs of "
    "max|x| / 254 * sum|W_i|. u is the dtype's unit roundoff, u32 float32's."
)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """What rounding may do to numbers below the normal ones: 6e-8 in float16, next to nothing in the others."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


U32 = unit_roundoff(torch.float32)


def long_sum(n: int) -> float:
    """Relative error of one float32 sum of n products, of the sum of their magnitudes."""
    return LAMBDA * math.sqrt(n) * U32


def linear(scale: Tensor, parts: Tensor, products: int, dtype: torch.dtype, ranks: int) -> Tensor:
    """scale: no less than |W||x| + |b|; the product of norms is not, by Cauchy and Schwarz. parts: what is rounded to
    `dtype`, in magnitude: the sum over ranks of |W_r x_r|, + |b|."""
    return 2 * long_sum(products) * scale + (ranks + 1) * (unit_roundoff(dtype) * parts + underflow(dtype))


def coded_input(x: Tensor, weight: Tensor, group: int) -> Tensor:
    """What rounding x to signed 8 bits, with a scale of its own for each group of inputs, may do to W x: at most half a
    step, max|x| / 254, at each of a group's elements. x [T, K], weight [N, K] float32 -> [T, N]."""
    x, weight = (F.pad(t, (0, -t.shape[-1] % group)).unflatten(-1, (-1, group)).abs() for t in (x, weight))
    return x.amax(-1) / 254 @ weight.sum(-1).T


def experts(hidden: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor,
            activation: Callable[[Tensor], Tensor], dtype: torch.dtype, first: int = 0) -> tuple[Tensor, ...]:
    """What experts `first` and following give to a layer's output, float32 [T, H], how far it may be off, and the
    magnitudes that are summed: over a token's experts, share x |down| |gated|.

    hidden [T, H], shares [T, k]: float32; chosen: int64 [T, k]; gate_up [E, 2 x width, H], down [E, H, width]. The
    error of gate and up goes through the activation, whose slope is at most STEEPEST, and through |down|.
    """
    y, bound, parts = (torch.zeros_like(hidden) for _ in range(3))
    for expert in chosen.unique().tolist():
        if not first <= expert < first + len(gate_up):
            continue
        tokens, which = (chosen == expert).nonzero(as_tuple=True)
        x, share = hidden[tokens], shares[tokens, which, None]
        w, d = gate_up[expert - first].float(), down[expert - first].float()
        both = F.linear(x, w)
        off = linear(x.norm(dim=1)[:, None] * w.norm(dim=1), both.abs(), w.shape[1], dtype, 1)
        (g, u), (g_off, u_off) = both.chunk(2, -1), off.chunk(2, -1)
        gated = activation(g) * u
        off = STEEPEST * g_off * (u.abs() + u_off) + activation(g).abs() * u_off + elementwise(gated.to(dtype))
        spread = F.linear(gated.abs(), d.abs())
        summed = linear(gated.norm(dim=1)[:, None] * d.norm(dim=1), spread, d.shape[1], dtype, 1)
        y.index_add_(0, tokens, share * F.linear(gated, d))
        bound.index_add_(0, tokens, share.abs() * (F.linear(off, d.abs()) + summed))
        parts.index_add_(0, tokens, share.abs() * spread)
    return y, bound, parts


def experts_summed(parts: Tensor, experts: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """Of the roundings to `dtype` where `experts` terms of a token are weighted and added, and the ranks' sums."""
    return (2 * experts + ranks + 3) * (unit_roundoff(dtype) * parts + underflow(dtype))


def norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """RMSNorm or LayerNorm of x over its last dimension; x, y float32. mean|x| / std x: what the mean's error does."""
    written, scale = (y.abs(),) * 2
    if bias is not None:  # LayerNorm also subtracts a mean
        shift = x.abs().mean(-1, keepdim=True) / x.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
        written = y.abs() + bias.abs()
        scale = written + weight.abs() * shift
    lost = 4 * underflow(dtype) * (1 + weight.abs())
    return 2 * 3 * long_sum(x.shape[-1]) * scale + 4 * unit_roundoff(dtype) * written + lost


def attention(scale: Tensor, score: float, head_dim: int, keys: int, dtype: torch.dtype, eager: bool) -> Tensor:
    """scale: softmax(s) |v|, element by element; score: a bound of |q . k| / sqrt(head_dim)."""
    u = unit_roundoff(dtype)
    shift = (long_sum(head_dim) + (2 * u if eager else 0.0)) * score
    eta = 2 * (math.expm1(min(2 * shift, 50.0)) + 2 * long_sum(keys) + 8 * U32 + 2 * u)
    return eta * scale + 4 * underflow(dtype)


def elementwise(x: Tensor) -> Tensor:
    """A chain of operations on each element, in float32 and rounded; tails of gelu cancel to a part of the row."""
    x, u, least = x.float().abs(), unit_roundoff(x.dtype), underflow(x.dtype)
    return ROUNDINGS * (u * x + least) + 4 * U32 * x.amax(-1, keepdim=True)
