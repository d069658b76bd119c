"""The one-process side of verify: plain Transformers on the checkpoint's whole tensors, never more than one module's.

Nothing of the sharded path computes here: modules are those Transformers builds, files are opened by safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from adapter.checkpoint.lora import MergedCheckpoint, merge
from adapter.checkpoint.plain import read_plain
from adapter.checkpoint.safetensors import Checkpoint, TensorInfo
from adapter.checkpoint.sharded import Shards, read_whole
from adapter.kernels.linear import FEW_ROWS, Quantised, make_weight
from adapter.model.meta_init import build_on_meta
from adapter.model.published import PublishedModules
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.verify import bounds
from adapter.verify.comparison import Expected, holding, put, take, tensors_in
from policies.formats import GROUP
from policies.rules import Claim, Column, Experts, Fused, Range, Row, TensorSlice

CHUNK = 1 << 24  # elements of an output that are looked at together: 64 MB in float32
Tick = Callable[[], None]


def read_tensor(checkpoint: Checkpoint | Shards, name: str, part: TensorSlice | None = None) -> Tensor:
    """A tensor by published name (of a tied pair the one that is stored), or a slice of it, through safetensors, with
    the updates of its adapters; one that is stored quantised whole, by other code than ranks use, in float32."""
    if isinstance(checkpoint, Shards):
        assert part is None, "shards are slices"
        return read_whole(checkpoint, name)
    dim, ranges = (None, ()) if part is None else (part.dim, part.ranges)
    if name in checkpoint.swapped:
        dim = dim if not dim else 3 - dim
        return _read(checkpoint.tensors[name], dim, ranges).transpose(1, 2)
    if checkpoint.is_quantised(name):
        return _cut(read_plain(checkpoint, name), dim, ranges)
    if not isinstance(checkpoint, MergedCheckpoint) or not (found := checkpoint.updates(name)):
        return _read(checkpoint.tensors[name], dim, ranges)
    base = [update.base for update in found if update.base] or [checkpoint.tensors[name]]
    updates = [(_read(u.b, 0 if dim == 0 else None, ranges), _read(u.a, 1 if dim == 1 else None, ranges), u.scale)
               for u in found]
    return merge(_read(base[-1], dim, ranges), updates, getattr(torch, checkpoint.dtype))


def _read(info: TensorInfo, dim: int | None, ranges: tuple[Range, ...]) -> Tensor:
    with safe_open(info.file, framework="pt") as file:
        if dim is None:
            return file.get_tensor(info.name)
        return _cut(file.get_slice(info.name), dim, ranges)


def _cut(whole: Any, dim: int | None, ranges: tuple[Range, ...]) -> Tensor:
    """The ranges along `dim` of a tensor, or of what safetensors gives for one."""
    if dim is None:
        return torch.as_tensor(whole)
    return torch.cat([whole[(slice(None),) * dim + (slice(a, b),)] for a, b in ranges], dim)


def stored_name(plan: Plan, name: str) -> str:
    """The tensor that holds parameter `name`: of a tied pair there is one."""
    return plan.policy.tied[1] if plan.geometry.tied and name == plan.policy.tied[0] else name


class Reference:
    """The model of a directory for one process, built twice on `meta`: in the sharded run's dtype, whose forwards are
    replayed, and in float32, which computes. The checkpoint's tensors go through `dtype` first, as the shards' did."""

    def __init__(self, directory: Path, plan: Plan, checkpoint: Checkpoint | Shards, dtype: torch.dtype, attention: str,
                 device: str) -> None:
        self.plan, self.checkpoint, self.dtype, self.device = plan, checkpoint, dtype, device
        self.skeleton = self._named(build_on_meta(directory, plan.policy, dtype, attention), dtype)
        exact = "eager" if attention == "eager" else "sdpa"  # flash attention computes in half precision only
        self.exact = build_on_meta(directory, plan.policy, torch.float32, exact)
        self._modules = self._named(self.exact, torch.float32)

    def _named(self, model: nn.Module, dtype: torch.dtype) -> Mapping[str, nn.Module]:
        """Weights become one zero each, seen in full shape: no memory, but a true device, which models ask for."""
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
            for name, weight in module._parameters.items():
                if weight is not None:
                    zero = torch.zeros((), dtype=dtype, device=self.device)  # some releases build an encoder in its own
                    module._parameters[name] = nn.Parameter(zero.expand(weight.shape), False)
        return PublishedModules(model, self.plan.policy)

    def weights(self, name: str, held: bool = False) -> dict[str, Tensor]:
        """The whole parameters of one claimed module in the shards' dtype, given in float32. held: as the shards hold
        them, quantised or not; else as the checkpoint has them. Shards have them as they are held and no otherwise."""
        found = {suffix: read_tensor(self.checkpoint, stored_name(self.plan, f"{name}.{suffix}")).to(self.dtype)
                 for suffix in self.plan.claims[name].parameters()}
        if held and "weight" in found and isinstance(self.checkpoint, Checkpoint):
            coded = make_weight(found["weight"], self.plan.format_of(name))
            found["weight"] = coded.dense() if isinstance(coded, Quantised) else coded
        return {suffix: tensor.to(self.device, torch.float32) for suffix, tensor in found.items()}

    def expected(self, plan: Plan, tp: Group, name: str, claim: Claim, layer: nn.Module, x: Any) -> Iterator[Expected]:
        """What layer `name` must return for the whole input x: an adapter.verify.trace.Oracle."""
        if isinstance(claim.rule, Experts):
            yield self._experts(name, plan.tp_size, x)
            return
        x, *more = x if isinstance(x, tuple) else (x,)  # a norm may have a gate beside its input
        weights, ids = self.weights(name, held=True), not x.is_floating_point()
        rows = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1]) if len(claim.weight) < 3 else x
        more = [each.reshape(rows.shape) for each in more]
        step = max(1, CHUNK // weights["weight"].shape[1 if ids else 0])
        parts = [plan.slice(name, "weight", r) for r in range(plan.tp_size)]
        for start in range(0, len(rows), step):
            gates = [each[start:start + step].float() for each in more]
            values, bound = self._part(name, claim, weights, rows[start:start + step], gates, parts)
            if self.plan.format_of(name).bits and not ids and len(rows) <= FEW_ROWS:
                bound = bound + bounds.coded_input(rows[start:start + step].float(), weights["weight"], GROUP)
            if isinstance(claim.rule, Column | Fused):
                values, bound = (torch.cat([take(t, p) for p in parts], -1) for t in (values, bound))
            yield Expected(slice(start, start + step), None, values, bound)

    def _part(self, name: str, claim: Claim, weights: Mapping[str, Tensor], x: Tensor, gates: list[Tensor],
              parts: list[TensorSlice]) -> tuple[Tensor, Tensor]:
        module = self._modules[name]
        if not x.is_floating_point():
            return (y := self._call(module, weights, x)), torch.zeros_like(y)
        x, weight, bias = x.float(), weights["weight"], weights.get("bias")
        y = self._call(module, weights, x, *gates)
        if weight.ndim == 1:
            return y, bounds.norm(x, y, weight, bias, self.dtype)
        y = y.reshape(len(x), -1)
        unbiased = y if bias is None else y - bias
        scale = x.flatten(1).norm(dim=1)[:, None] * weight.flatten(1).norm(dim=1) + (0 if bias is None else bias.abs())
        rounded, ranks = unbiased.abs(), 1
        if isinstance(claim.rule, Row):
            ranks = len(parts)
            pairs = ((take(x, p), take(weight, p)) for p in parts)
            rounded = sum((F.linear(a, w).abs() for a, w in pairs), torch.zeros_like(y))
        rounded = rounded if bias is None else rounded + bias.abs()
        return y, bounds.linear(scale, rounded, math.prod(weight.shape[1:]), self.dtype, ranks)

    def _experts(self, name: str, ranks: int, inputs: tuple[Tensor, Tensor, Tensor]) -> Expected:
        """What the experts of a layer must return for hidden states, chosen experts and their weights."""
        module: Any = self._modules[name]
        weights = self.weights(name, held=True)
        hidden, chosen, shares = inputs[0].float(), inputs[1], inputs[2].float()
        y = self._call(module, weights, hidden, chosen, shares)
        _, bound, parts = bounds.experts(hidden, chosen, shares, weights["gate_up_proj"], weights["down_proj"],
                                       module.act_fn, self.dtype)
        return Expected(slice(None), None, y, bound + bounds.experts_summed(parts, chosen.shape[-1], ranks, self.dtype))

    def _call(self, module: nn.Module, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        with holding(module, weights):
            return next(tensors_in(module(*inputs)))  # of a router's outputs its logits

    @contextmanager
    def streaming(self, tick: Tick) -> Iterator[nn.Module]:
        """The whole float32 model, ready to run: each module's weights are read when it is entered and let go when it
        is left. `tick` is called at each."""
        handles = []
        for name in self.plan.claims:
            module, empty = self._modules[name], dict[str, Tensor]()

            def enter(module: nn.Module, _: object, name: str = name, empty: dict[str, Tensor] = empty) -> None:
                empty.update(put(module, self.weights(name)))

            def leave(module: nn.Module, *_: object, empty: dict[str, Tensor] = empty) -> None:
                put(module, empty)
                tick()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield self.exact
        finally:
            for handle in handles:
                handle.remove()
