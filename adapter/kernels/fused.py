"""What a decode step does between its matrix products: one C++ operator each on CPU, the same in torch elsewhere. And
modules of Transformers' own forward, for a prompt, that compute the same in less time on CPU.

Signatures and shapes are those of adapter/kernels/csrc/fused.cpp; results round where Transformers' do, rotations but
once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from adapter.kernels import build
from adapter.kernels import linear as kernels

TABLED = tuple(type(ACT2FN[name]) for name in ("quick_gelu", "silu"))  # activations of the encoders' MLPs


def operators(compiled: bool) -> Any:
    """The operators of a decode step, `rms_norm`, `add_rms_norm`, `silu_mul`, `visible` and `attend`: those in C++, or
    the same in torch."""
    return CompiledOps() if compiled else TorchOps


def unavailable(device: str) -> str | None:
    """Why tensors of this kind of device have no C++ operators, in words; None where they have."""
    return f"they are for a CPU, this is {device}" if device != "cpu" else build.unavailable()


class CompiledOps:
    """torch.ops.qwenvl_tp, which read the lengths themselves and attend to what is filled."""

    def __init__(self) -> None:
        ops = torch.ops.qwenvl_tp
        self.rms_norm, self.add_rms_norm, self.silu_mul = ops.rms_norm, ops.add_rms_norm, ops.silu_mul
        self.attend = ops.attend

    @staticmethod
    def visible(first: Tensor, place: Tensor, attended: int) -> Tensor:
        return first


class Tabled(nn.Module):
    """An activation that is a function of one number, by its values for all numbers of 16 bits: on CPU in half
    precision it is what the activation itself gives, bit for bit, in one pass over memory."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
            return self.activation(x)
        table = _values(type(self.activation), x.dtype)  # type: ignore[arg-type]  # a class can be hashed
        out: Tensor = torch.ops.qwenvl_tp.look_up(x, table)
        return out


@cache
def _values(activation: Callable[[], nn.Module], dtype: torch.dtype) -> Tensor:
    """Of an activation without parameters for the numbers whose bits are 0 ... 65,535."""
    with torch.no_grad():
        return activation()(torch.arange(1 << 16).to(torch.uint16).view(dtype))


class Patches(nn.Module):
    """A convolution over patches of its own size, [N, in, *kernel] -> [N, out, 1, 1, 1]: a matrix product, for which
    torch's convolution takes three times as long. In float32 it is torch's own, bit for bit."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        fits = x.device.type == "cpu" and x.dtype is torch.bfloat16 and x.shape[1:] == self.weight.shape[1:]
        if not fits:
            return F.conv3d(x, self.weight, self.bias, self.weight.shape[2:])
        y = kernels.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return y.view(*y.shape, *[1] * (x.ndim - 2))


def fuse(model: nn.Module) -> None:
    """Put `Tabled` around the activations of the MLPs and `Patches` in a convolution's place, if the machine has the
    operators."""
    if build.unavailable() is None:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) in TABLED:
                    setattr(module, name, Tabled(child))
                if isinstance(child, nn.Conv3d) and child.kernel_size == child.stride and not any(child.padding):
                    setattr(module, name, Patches(child))


class TorchOps:
    """The operators in torch, on tensors that never change their shapes, which a CUDA graph can hold."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return TorchOps.rms_norm(x.add_(delta), weight, eps)

    @staticmethod
    def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def visible(first: Tensor, place: Tensor, attended: int) -> Tensor:
        """bool [rows, 1, 1, attended]: the places that each row's new token sees. Once a step, for all layers."""
        places = torch.arange(attended, device=first.device)
        return ((places >= first[:, None]) & (places <= place))[:, None, None]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, visible: Tensor,
               place: Tensor, scale: float) -> Tensor:
        """keys, values: [rows, KV heads, attended, D]. The query heads of one KV head are taken for as many queries, so
        that no key is repeated for them."""
        rows, kv_heads, _, dim = keys.shape
        q, k, v = q.view(rows, -1, 1, dim), k.view(rows, -1, 1, dim), v.view(rows, -1, 1, dim)
        keys.index_copy_(2, place, _rotated(k, cos, sin))
        values.index_copy_(2, place, v)
        queries = _rotated(q, cos, sin).view(rows, kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(queries, keys, values, visible, scale=scale)
        return out.reshape(rows, -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, 1, D] turned by cos, sin [B, D]."""
    a, b = x.float().chunk(2, -1)
    c, s = cos.float()[:, None, None], sin.float()[:, None, None]
    return (x.float() * c + torch.cat([-b, a], -1) * s).to(x.dtype)
