"""Every weight format against float64, with bounds that follow from how it rounds; what is refused; what is lean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adapter.kernels import build
from adapter.kernels import linear as kernels
from adapter.kernels.fused import TABLED, Patches, Tabled, TorchOps
from adapter.kernels.linear import FEW_ROWS, Quantised, linear, quantise
from adapter.verify import bounds
from policies.errors import UserError
from policies.formats import DENSE, GROUP, INT4, INT8

needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    scale = x.float().norm(dim=-1)[:, None] * weight.float().norm(dim=-1)
    scale = scale if bias is None else scale + bias.float().abs()
    return bounds.linear(scale, exact(x, weight, bias).float().abs() + scale / 256, x.shape[-1], x.dtype, 1)


def test_machine_of_these_tests_has_the_kernels_or_says_why():
    """Here a silent fallback would leave every other test of this file without a subject."""
    with open("/proc/cpuinfo") as info:
        able = {"avx512_bf16", "avx512_vnni", "avx512bw", "avx512vl"} <= set(info.read().split())
    assert (kernels.missing() is None) == able, kernels.missing()


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [
    (64, 1), (1536, 40), (4480, 7), (100, 33), (30, 5), (1087, 29), (1, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_linear(rows, inputs, outputs, with_bias):
    x, w = drawn(rows, inputs, dtype=torch.bfloat16), drawn(outputs, inputs, seed=1, dtype=torch.bfloat16, scale=0.05)
    bias = drawn(outputs, seed=2, dtype=torch.bfloat16) if with_bias else None
    y = linear(x, w, bias)
    assert y.shape == (rows, outputs) and y.dtype is torch.bfloat16
    assert ((y.double() - exact(x, w, bias)).abs() <= rounding(x, w, bias)).all()


@needs_kernels
def test_more_rows_than_are_packed_at_once_and_more_threads_than_one():
    x, w = drawn(1300, 1001, dtype=torch.bfloat16), drawn(70, 1001, seed=1, dtype=torch.bfloat16)
    y = torch.ops.qwenvl_tp.linear(x, w, None)
    assert ((y.double() - exact(x, w, None)).abs() <= rounding(x, w, None)).all()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows in (1, 9, 1300):
            one, many = (torch.ops.qwenvl_tp.linear(x[:rows], w, None) for _ in range(2))
            assert torch.equal(one, many)
            assert ((one.double() - y[:rows].double()).abs() <= rounding(x[:rows], w, None)).all()
        assert torch.equal(one, y)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_columns_of_a_weight_are_read_where_they_lie(rows):
    x, w = drawn(rows, 37, dtype=torch.bfloat16), drawn(30, 100, seed=1, dtype=torch.bfloat16)
    assert torch.equal(linear(x, w[:, 5:42]), linear(x, w[:, 5:42].contiguous()))


@needs_kernels
def test_what_lies_behind_an_odd_row_is_not_multiplied():
    """A row's last input alone makes half a pair; the other half in memory is the next row's first."""
    x, w = drawn(20, 7, dtype=torch.bfloat16), drawn(6, 7, seed=1, dtype=torch.bfloat16)
    w[3, 0] = float("inf")
    y = torch.ops.qwenvl_tp.linear(x, w, None)
    assert torch.isfinite(y[:, [0, 1, 2, 4, 5]]).all() and not torch.isfinite(y[:, 3]).any()


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 3), (192, 40), (1536, 17), (1088, 5), (224, 6), (30, 2)])
def test_quantised_linear(rows, bits, dtype, inputs, outputs):
    """Against the weights the codes stand for: few rows of x are rounded to 8 bits, more are not."""
    x, bias = drawn(rows, inputs, dtype=dtype), drawn(outputs, seed=2, dtype=dtype)
    weight = quantise(drawn(outputs, inputs, seed=1, dtype=dtype, scale=0.05), bits)
    stands_for = kernels.unpack(weight.codes, weight.scales, bits, torch.float32)[:, :inputs]
    bound = rounding(x, stands_for, bias)
    if rows <= FEW_ROWS:
        bound = bound + bounds.coded_input(x.float(), stands_for, GROUP)
    else:
        bound = bound + 2 * bounds.unit_roundoff(dtype) * (x.float().abs() @ stands_for.abs().T)  # unpacked in dtype
    error = (linear(x, weight, bias).double() - exact(x, stands_for, bias)).abs()
    assert (error <= bound).all()
    assert linear(x[0], weight, bias).shape == (outputs,)


def offset(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same in memory that begins `by` bytes after a line of 64."""
    size = tensor.nbytes
    memory = torch.empty(size + by, dtype=torch.uint8)[by:]
    memory.copy_(tensor.reshape(-1).view(torch.uint8))
    return memory.view(tensor.dtype).view(tensor.shape)


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 3, 17, 35])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_of_codes_need_not_begin_at_a_line_of_memory(bits, groups, rows):
    """An odd number of groups of 4 bits puts every other row of codes at 32 bytes (2B at tp 4: 35, 7B at tp 8: 37)."""
    x, weight = drawn(rows, groups * GROUP), quantise(drawn(9, groups * GROUP, seed=1, scale=0.05), bits)
    moved = Quantised(offset(weight.codes, 32), offset(weight.scales, 2), bits, weight.inputs, weight.dtype)
    assert moved.codes.data_ptr() % 64 == 32
    y = linear(x, weight)
    assert torch.equal(linear(offset(x, 4), moved), y)
    stands_for = weight.dense()
    bound = rounding(x, stands_for, None) + bounds.coded_input(x, stands_for, GROUP)
    assert ((y.double() - exact(x, stands_for, None)).abs() <= bound).all()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 9, 40])
def test_operands_need_not_begin_at_a_line_of_memory(rows):
    x, w = drawn(rows, 96, dtype=torch.bfloat16), drawn(7, 96, seed=1, dtype=torch.bfloat16)
    assert torch.equal(linear(offset(x, 2), offset(w, 34)), linear(x, w))


@needs_kernels
def test_the_bound_of_coded_inputs_is_no_formality():
    """The error of few rows is a good part of it, and past what the same product has without the codes."""
    x, weight = drawn(1, 1536), quantise(drawn(64, 1536, seed=1, scale=0.05), 8)
    dense = kernels.unpack(weight.codes, weight.scales, 8, torch.float32)
    error = (linear(x, weight).double() - exact(x, dense, None)).abs().max()
    assert error > 10 * (linear(x.expand(40, -1), weight).double() - exact(x.expand(40, -1), dense, None)).abs().max()
    assert error > bounds.coded_input(x, dense, GROUP).max() / 100


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([8, 4]), st.integers(0, 99))
def test_codes_are_nearest_and_slices_on_groups_are_slices_of_the_whole(rows, groups, bits, seed):
    weight = drawn(rows, groups * GROUP, seed=seed)
    whole = quantise(weight, bits)
    step = whole.scales.float().repeat_interleave(GROUP, 1)
    assert ((whole.dense() - weight).abs() <= step * 0.5005 + 1e-6).all()
    for start in range(groups):
        part = quantise(weight[:, start * GROUP:(start + 1) * GROUP], bits)
        assert torch.equal(part.dense(), whole.dense()[:, start * GROUP:(start + 1) * GROUP])
    assert whole.nbytes == (INT8 if bits == 8 else INT4).bytes(rows, groups * GROUP)


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_weights(bits):
    """A group of zeros, one outlier, values too small for float16 scales."""
    weight = torch.zeros(3, 128)
    weight[1, 5], weight[2] = 1000.0, 1e-9
    coded = quantise(weight, bits)
    assert torch.isfinite(coded.dense()).all() and (coded.dense()[0] == 0).all()
    assert abs(float(coded.dense()[1, 5]) - 1000) < 1 and (coded.dense()[2].abs() < 1e-4).all()


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_unpacking_in_cpp_and_in_torch_are_the_same_bits(bits):
    weight = quantise(drawn(33, 192), bits)
    for dtype in (torch.float32, torch.bfloat16):
        ours = torch.ops.qwenvl_tp.dequantise(weight.codes, weight.scales, bits, dtype)
        assert torch.equal(ours, kernels.unpack(weight.codes, weight.scales, bits, dtype))


@needs_kernels
def test_not_a_number_stays_one():
    x = torch.full((1, 64), float("nan"), dtype=torch.bfloat16)
    assert linear(x, drawn(4, 64, dtype=torch.bfloat16)).isnan().all()


@needs_kernels
@pytest.mark.parametrize(("call", "words"), [
    (lambda o: o.linear(torch.ones(1, 64), torch.ones(2, 64), None), "bfloat16"),
    (lambda o: o.linear(torch.ones(1, 32).bfloat16(), torch.ones(2, 64).bfloat16(), None), "weight"),
    (lambda o: o.linear(torch.ones(64, 2).bfloat16().T, torch.ones(2, 64).bfloat16(), None), "contiguous"),
    (lambda o: o.attend_all(*[torch.ones(1, 3, 130).bfloat16()] * 3, 1.0, False), "head_dim 130"),
    (lambda o: o.silu_mul(torch.ones(2), torch.ones(3)), "not like"),
    (lambda o: o.rotate(torch.ones(2, 3, 4).transpose(1, 2), *[torch.ones(2, 3)] * 2), "contiguous"),
    (lambda o: o.rotate(torch.ones(2, 3, 5), *[torch.ones(2, 5)] * 2), "even"),
    (lambda o: o.rotate(torch.ones(2, 3, 4), *[torch.ones(2, 4).bfloat16()] * 2), "float32"),
    (lambda o: o.rotate(torch.ones(2, 3, 4), *[torch.ones(1, 4)] * 2), "float32"),
])
def test_operators_refuse_what_they_cannot_take(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.qwenvl_tp)


def test_formats_that_cannot_be_computed_here_are_refused_with_the_way_out(monkeypatch):
    with pytest.raises(UserError, match=r"int8.*this is cuda.*weights\.format=dense"):
        kernels.check(INT8, torch.bfloat16, "cuda")
    monkeypatch.setattr(kernels, "missing", lambda: "no compiler")
    with pytest.raises(UserError, match=r"int4.*no compiler.*weights\.format=dense"):
        kernels.check(INT4, torch.bfloat16, "cpu")


def test_a_plain_weight_without_kernels_is_multiplied_by_torch_and_reported(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "missing", lambda: "no compiler")
    kernels.check(DENSE, torch.bfloat16, "cpu")
    assert "no compiler" in caplog.text
    x, w = drawn(1, 64, dtype=torch.bfloat16), drawn(3, 64, seed=1, dtype=torch.bfloat16)
    assert torch.equal(linear(x, w), F.linear(x, w))


@pytest.mark.skipif(build.unavailable() is not None, reason="no C++ operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_operators_equal_their_formulas(dtype):
    ops, u = torch.ops.qwenvl_tp, torch.finfo(dtype).eps
    x, delta, w = drawn(3, 96, dtype=dtype), drawn(3, 96, seed=1, dtype=dtype), drawn(96, seed=2, dtype=dtype)
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-6), TorchOps.rms_norm(x, w, 1e-6), rtol=2 * u, atol=2 * u)
    one, two = x.clone(), x.clone()
    a, b = ops.add_rms_norm(one, delta, w, 1e-6), TorchOps.add_rms_norm(two, delta, w, 1e-6)
    assert torch.equal(one, two)
    torch.testing.assert_close(a, b, rtol=2 * u, atol=2 * u)
    torch.testing.assert_close(ops.silu_mul(x, delta), TorchOps.silu_mul(x, delta), rtol=2 * u, atol=2 * u)
    wide = torch.linspace(-100, 100, 9999).to(dtype)
    torch.testing.assert_close(ops.silu_mul(wide, wide), TorchOps.silu_mul(wide, wide), rtol=2 * u, atol=1e-6)
    batch, kv, groups, length, dim = 3, 2, 3, 11, 16
    q, k, v = (drawn(batch, n * dim, seed=i, dtype=dtype) for i, n in enumerate((kv * groups, kv, kv)))
    cos, sin = drawn(batch, dim, seed=5, dtype=dtype), drawn(batch, dim, seed=6, dtype=dtype)
    caches = [drawn(batch, kv, length, dim, seed=7 + i, dtype=dtype) for i in range(2)]
    start, place = torch.tensor([0, 4, 7]), torch.tensor([8])
    theirs = [c.clone() for c in caches]
    ours = ops.attend(q, k, v, cos, sin, *caches, start, place, dim ** -0.5)
    visible = TorchOps.visible(start, place, length)
    plain = TorchOps.attend(q, k, v, cos, sin, *theirs, visible, place, dim ** -0.5)
    torch.testing.assert_close(ours, plain, rtol=8 * u, atol=8 * u)
    torch.testing.assert_close(caches, theirs, rtol=2 * u, atol=2 * u)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", TABLED)
def test_an_activation_by_its_table_is_the_activation(activation, dtype):
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(256, 256)
    ours, theirs = Tabled(activation())(every), activation()(every)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(Tabled(activation())(every[:, ::2]), theirs[:, ::2], rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_over_its_own_size_is_a_product(dtype):
    convolution = torch.nn.Conv3d(3, 40, (2, 14, 14), (2, 14, 14), bias=False).to(dtype)
    x = drawn(50, 3, 2, 14, 14, dtype=dtype)
    ours, theirs = Patches(convolution)(x), convolution(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if dtype is torch.float32 else 1e-2)
    wide = drawn(2, 3, 2, 28, 28, dtype=dtype)
    assert torch.equal(Patches(convolution)(wide), convolution(wide))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (7, 3, 80), (200, 2, 128), (65, 1, 36)])
def test_heads_are_rotated_where_they_are(tokens, heads, dim, dtype):
    """Rounded once; what lies beside them stays."""
    fused, angles = drawn(tokens, 3 * heads, dim, dtype=dtype), drawn(tokens, dim, dtype=torch.float32)
    before, cos, sin = fused.clone(), angles.cos(), angles.sin()
    torch.ops.qwenvl_tp.rotate(fused[:, :2 * heads], cos, sin)
    x = before[:, :2 * heads].double()
    turned = torch.cat([-x[..., dim // 2:], x[..., :dim // 2]], -1)
    exact = x * cos.double()[:, None] + turned * sin.double()[:, None]
    bound = torch.finfo(dtype).eps * 0.5 * exact.abs() + 1e-6
    assert bool(((fused[:, :2 * heads].double() - exact).abs() <= bound).all())
    assert torch.equal(fused[:, 2 * heads:], before[:, 2 * heads:])


@needs_kernels
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 1, 80), (2, 7, 80), (3, 63, 16), (2, 65, 128), (1, 130, 4),
                                                      (2, 64, 64), (1, 6, 30), (6, 200, 96)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_picture_and_of_a_prompt(heads, tokens, dim, causal):
    """Within what rounding probabilities and results to bfloat16 may do; strided as the fused qkv gives it."""
    q, k, v = (t.transpose(0, 1) for t in drawn(tokens, 3, heads, dim, dtype=torch.bfloat16, scale=2.0).unbind(1))
    if causal and heads % 2 == 0:
        k, v = k[::2], v[::2]  # of two query heads each
    ours = torch.ops.qwenvl_tp.attend_all(q, k, v, dim ** -0.5, causal).transpose(0, 1).double()

    def exact(v):
        return F.scaled_dot_product_attention(q.double(), k.double(), v, is_causal=causal, enable_gqa=True)

    true, spread = exact(v.double()), exact(v.double().abs())
    score = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) / dim ** 0.5
    assert ((ours - true).abs() <= bounds.attention(spread.float(), score, dim, tokens, torch.bfloat16, False)).all()


@needs_kernels
def test_a_quantised_weight_gives_rows_as_a_matrix_does():
    weight = quantise(drawn(9, 128), 4)
    assert isinstance(weight, Quantised) and weight.shape == (9, 128)
    assert torch.equal(weight[torch.tensor([3, 1])], weight.dense()[[3, 1]])
    assert quantise(drawn(9, 100), 4)[torch.tensor([3, 1])].is_contiguous(), "a last group that is filled up"
