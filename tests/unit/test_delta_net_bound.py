"""The bound of a gated delta rule: Transformers' own module in float32 and bfloat16 against a recurrence in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checkpoints import random_tensor
from families import CONFIGS

from adapter.planning.plan import Plan
from adapter.verify import delta_net
from policies.registry import policy_for

modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5", reason="a release without it")
configuration = pytest.importorskip("transformers.models.qwen3_5.configuration_qwen3_5")
CONFIG = CONFIGS["qwen3_5"] | {"model_type": "qwen3_5"}
KEYS, VALUES, K, V = 16, 32, 8, 6


def recurrence(qkv, beta, decay, net) -> torch.Tensor:
    """float64 [B, S, value heads, V] token by token, from what the linear layers gave."""
    weight = net.conv1d.weight.double()
    mixed = F.silu(F.conv1d(qkv.double().transpose(1, 2), weight, padding=3, groups=len(weight)))[..., :qkv.shape[1]]
    q, k, v = mixed.transpose(1, 2).split([KEYS * K, KEYS * K, VALUES * V], -1)
    q, k = (t.unflatten(-1, (KEYS, K)).repeat_interleave(VALUES // KEYS, 2) for t in (q, k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    v, b = v.unflatten(-1, (VALUES, V)), beta.double().sigmoid()
    a = (-net.A_log.double().exp() * F.softplus(decay.double() + net.dt_bias.double())).exp()
    state, out = torch.zeros(len(qkv), VALUES, K, V, dtype=torch.float64), []
    for t in range(qkv.shape[1]):
        state = state * a[:, t, :, None, None]
        new = (v[:, t] - (state * k[:, t, ..., None]).sum(-2)) * b[:, t, :, None]
        state = state + k[:, t, ..., None] * new[..., None, :]
        out.append((state * q[:, t, ..., None]).sum(-2) / K ** 0.5)
    return torch.stack(out, 1)


@pytest.mark.parametrize(("dtype", "slow", "found"), [
    (torch.float32, 0.0, 0.9), (torch.float32, -6.0, 0.9), (torch.bfloat16, 0.0, 0.05)])
def test_a_correct_computation_stays_within_the_bound_and_a_wrong_one_does_not(dtype, slow, found):
    """slow: added to A_log; at -6 a state keeps nearly all of 150 tokens. found: the least share of the numbers that
    are off by more than the bound where channels are shifted by one; verify needs one."""
    policy = policy_for(CONFIG)
    plan = Plan(policy, policy.geometry(CONFIG), 1, "float32")
    net = modeling.Qwen3_5GatedDeltaNet(configuration.Qwen3_5TextConfig(**CONFIG["text_config"]), 0).to(dtype)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
        net.A_log += slow
    seen = {}
    for role, child in (("qkv", "in_proj_qkv"), ("beta", "in_proj_b"), ("decay", "in_proj_a")):
        getattr(net, child).register_forward_hook(lambda _m, _a, out, role=role: seen.update({role: out}))
    net.norm.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    with torch.inference_mode():
        net(torch.randn(2, 150, 80, generator=torch.Generator().manual_seed(1)).to(dtype))
        numbers = {role: seen[role] for role in ("qkv", "beta", "decay")}
        own = {name: net.get_parameter(name) for name in ("A_log", "dt_bias", "conv1d.weight")}
        limit = delta_net.bound(plan, policy.delta_net, numbers, own)[..., None]
        exact = recurrence(*numbers.values(), net)
        ours = seen["x"].view(exact.shape)
        off = (ours - exact).abs()
        share = float((off / (limit + torch.finfo(dtype).eps / 2 * ours.abs())).max())
        print(f"{dtype}, A_log {slow:+}: largest error {float(off.max()):.1e} of {float(exact.abs().max()):.2f}, "
              f"{share:.2g} of its bound")
        assert share < 0.5, "one side of two"
        wrong = (recurrence(numbers["qkv"].roll(1, -1), *list(numbers.values())[1:], net) - exact).abs() > limit
        print(f"channels shifted: {float(wrong.float().mean()):.2f} of the numbers are outside")
        assert wrong.float().mean() > found
