"""The bounds hold for correct computations in every dtype, and are tight enough to see a wrong one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapter.verify import bounds
from adapter.verify.comparison import furthest

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def partial_sums(seed: int, products: int, ranks: int, dtype: torch.dtype):
    """A row-parallel linear as `ranks` compute it in `dtype`, its float32 reference, and the bound between them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, products, generator=g).to(dtype)
    w, b = (torch.randn(s, generator=g).to(dtype) for s in ((7, products), (7,)))
    cut = [products * r // ranks for r in range(ranks + 1)]
    pieces = [(x[:, i:j], w[:, i:j]) for i, j in itertools.pairwise(cut)]
    ours = torch.zeros(5, 7, dtype=dtype)
    for a, c in pieces:
        ours = ours + F.linear(a, c)
    ours = ours + b
    one = F.linear(x.float(), w.float(), b.float())
    scale = F.linear(x.float().abs(), w.float().abs(), b.float().abs())
    parts = sum(F.linear(a.float(), c.float()).abs() for a, c in pieces) + b.float().abs()
    return ours, one, bounds.linear(scale, parts, products, dtype, ranks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 600), st.integers(1, 8), st.sampled_from(DTYPES))
def test_a_row_parallel_sum_stays_within_its_bound(seed, products, ranks, dtype):
    ours, one, bound = partial_sums(seed, products, ranks, dtype)
    assert furthest(ours, one, bound)[0] <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_bias_added_once_too_often_exceeds_it(ranks, dtype):
    ours, one, bound = partial_sums(1, 256, ranks, dtype)
    extra = torch.randn(7, generator=torch.Generator().manual_seed(9)).to(dtype)
    assert furthest(ours + extra, one, bound)[0] > 1


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.sampled_from([8, 64, 128]), st.floats(0.1, 6),
       st.sampled_from(DTYPES))
def test_attention_stays_within_its_bound(seed, keys, head_dim, size, dtype):
    g = torch.Generator().manual_seed(seed)
    q, k, v = ((torch.randn(1, 2, keys, head_dim, generator=g) * size).to(dtype) for _ in range(3))
    score = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) / head_dim ** 0.5
    exact = torch.softmax(q.double() @ k.double().transpose(-1, -2) / head_dim ** 0.5, -1)
    bound = bounds.attention((exact @ v.double().abs()).float(), score, head_dim, keys, dtype, False)
    assert furthest(attention(q, k, v), exact @ v.double(), bound)[0] <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_another_scale_exceeds_it(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 64, generator=g).to(dtype) for _ in range(3))
    score = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) / 8
    scale = attention(q.float(), k.float(), v.float().abs())
    bound = bounds.attention(scale, score, 64, 40, dtype, False)
    assert furthest(F.scaled_dot_product_attention(q, k, v, scale=0.1), attention(q, k, v).float(), bound)[0] > 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 800), st.floats(-3, 3), st.booleans(), st.sampled_from(DTYPES))
@example(512371, 102, 1.0, True, torch.float16)  # values below the normal ones
def test_norms_stay_within_their_bound(seed, width, mean, root_mean_square, dtype):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(6, width, generator=g) + mean).to(dtype)
    w, b = ((torch.randn(width, generator=g)).to(dtype) for _ in range(2))
    if root_mean_square:
        ours = w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        one, b = w.double() * x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6), None
    else:
        ours = F.layer_norm(x, (width,), w, b, 1e-6)
        one = F.layer_norm(x.double(), (width,), w.double(), b.double(), 1e-6)
    bound = bounds.norm(x.float(), one.float(), w.float(), None if b is None else b.float(), dtype)
    assert furthest(ours, one, bound)[0] <= 1
    other = ours.clone()
    other[2] *= 1.2 if dtype is not torch.float32 else 1.01
    assert furthest(other, one, bound)[0] > 1


def test_the_furthest_element_is_the_one_nearest_to_its_own_bound():
    ours, one = torch.tensor([[1.0, 2.0], [3.5, 4.0]]), torch.tensor([[1.0, 2.1], [3.0, 4.0]])
    share, error, bound, at = furthest(ours, one, torch.tensor([[1.0, 0.05], [1.0, 1.0]]))
    assert at == (0, 1) and share == pytest.approx(2.0, rel=1e-3) and error == pytest.approx(0.1) and bound > 0


@pytest.mark.parametrize("a, b, bound, share", [
    (NAN, NAN, 0.0, 0.0), (NAN, 1.0, 1.0, INF), (1.0, NAN, 1.0, INF), (INF, INF, 0.0, 0.0), (INF, 1.0, INF, INF),
    (1.0, 1.0, 0.0, 0.0), (1.0, 1.5, 0.0, INF), (1.0, 1.5, 1.0, 0.5),
])
def test_no_number_hides_a_difference(a, b, bound, share):
    assert furthest(torch.tensor([a]), torch.tensor([b]), torch.tensor([bound]))[0] == share
