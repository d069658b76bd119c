"""Replays: Transformers' own forward of one module for one process, with what its children returned already known.

So only the module's own part is computed: rotations and softmax, residuals, activations, masks, the places of image
features. What it passes to each child and what it returns must be what the sharded run was observed to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapter.planning.plan import Plan
from adapter.verify import bounds, delta_net
from adapter.verify.comparison import Comparison, Limit, compare_trees, tensors_in, with_own_containers
from policies.rules import Column, Experts, Fused, PerHead, Row


@dataclass(frozen=True)
class Call:
    """One call of a module as one process would have made it: whole inputs, whole output. order: when it ended."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


Calls = dict[str, list[Call]]  # published name of a child -> its calls, in order


class _UnknownCall(Exception):
    """The skeleton calls a module that the sharded run did not call: there is nothing to answer."""


@dataclass
class Replayer:
    """Replays modules of the one-process model.

    skeleton: published name -> module, its weights not needed. children: module -> the observed modules right below it.
    eager: whether attention rounds its scores to the dtype, as Transformers' "eager" does.
    unproven: attention modules and delta nets whose bound was no smaller than their values, which a comparison cannot
    find wrong.
    """

    skeleton: Mapping[str, nn.Module]
    plan: Plan
    children: Mapping[str, list[str]]
    eager: bool
    unproven: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        policy, geometry, net = self.plan.policy, self.plan.geometry, self.plan.policy.delta_net
        self.attention = {name: row.encoder for row in policy.head_numbers for name in policy.modules(row, geometry)}
        self.delta_nets = frozenset(policy.modules(net, geometry)) if net else frozenset[str]()

    def compare(self, name: str, call: Call, calls: Calls) -> Iterator[Comparison]:
        """Replay `call` of module `name`, during which its children were called as `calls` says."""
        left = {child: list(calls.get(child, ())) for child in {**calls, **dict.fromkeys(self.children[name])}}
        passed: list[tuple[str, Call, Any]] = []  # what the skeleton passed to each child

        def answer(child: str, *args: Any, **kwargs: Any) -> Any:
            if not left[child]:
                raise _UnknownCall(child)
            observed = left[child].pop(0)
            passed.append((child, observed, self._given(child, args, kwargs)))
            return with_own_containers(observed.output)

        unknown, result = None, None
        try:
            result = self._forward(name, {child: partial(answer, child) for child in left}, call)
        except _UnknownCall as stop:
            unknown = str(stop)
        for child, observed, given in passed:
            yield compare_trees(observed.order - 0.5, name, f"input of {child}", (observed.args, observed.kwargs),
                                given, self._limit(name, child, call, observed, calls))
        if unknown is not None:
            yield Comparison(call.order, name, f"does not call {unknown} where one process does", torch.inf)
            return
        yield compare_trees(call.order, name, "output", self.result(name, call.output), self.result(name, result), None)
        for child, more in left.items():
            if more:
                yield Comparison(call.order, name, f"calls {child} where one process does not", torch.inf)

    def _given(self, child: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a child that are compared: of a layer with weights its input, of experts all three, of a
        gated norm both."""
        if child not in self.plan.claims or child in self.delta_nets:
            return args, kwargs
        tensors = tuple(tensors_in((args, kwargs)))
        return tensors if isinstance(self.plan.claims[child].rule, Experts | PerHead) else tensors[:1], {}

    def result(self, name: str, output: Any) -> Any:
        """The part of an output that is compared: attention may add the scores of this rank's own heads."""
        return next(tensors_in(output)) if name in self.attention else output

    def _limit(self, name: str, child: str, call: Call, observed: Call, calls: Calls) -> Limit | None:
        """How far the input of `child` may be off: it is computed by `name` where the child is row-parallel, and in a
        delta net where it is the norm after the recurrence."""
        claim = self.plan.claims.get(child)
        if name in self.delta_nets:
            after = claim is not None and isinstance(claim.rule, PerHead)
            return partial(self._delta_bound, name, observed, calls) if after else None
        if claim is None or not isinstance(claim.rule, Row):
            return None
        if name in self.attention:
            return partial(self._attention_bound, name, call, calls)
        return partial(bounds.elementwise, observed.args[0])

    def _delta_bound(self, name: str, norm: Call, calls: Calls) -> Tensor:
        """delta_net.bound for the observed outputs of the linear layers, shaped like the norm's input."""
        net, x = self.plan.policy.delta_net, norm.args[0]
        assert net is not None
        numbers = {role: calls[f"{name}.{child}"][0].output for role, child in
                   (("qkv", net.qkv), ("beta", net.beta), ("decay", net.decay))}
        own = {suffix: self.skeleton[name].get_parameter(suffix) for suffix in self.plan.claims[name].parameters()}
        found = delta_net.bound(self.plan, net, numbers, own)
        limit = found.reshape(-1, 1) + bounds.elementwise(x)
        if (limit >= x.float().abs().amax(-1, keepdim=True)).all():
            self.unproven.add(name)
        return limit

    def _forward(self, name: str, answers: Mapping[str, Callable[..., Any]], call: Call) -> Any:
        """Transformers' forward of `name` on a call's arguments; a child in `answers` is not run but answered for."""
        children = {self.skeleton[child]: answer for child, answer in answers.items()}
        for child, answer in children.items():
            child.forward = answer
        try:
            return self.skeleton[name](*with_own_containers(call.args), **with_own_containers(call.kwargs))
        finally:
            for child in children:
                del child.forward

    def _attention_bound(self, name: str, call: Call, calls: Calls) -> Tensor:
        """bounds.attention for the observed q, k and v, and norms of q and k, which policies state in this order."""
        head_dim = self.plan.geometry.attention[self.attention[name]].head_dim
        rules = {c: self.plan.claims[c].rule for c in self.children[name] if c in self.plan.claims}  # no rotary table
        columns = [c for c, rule in rules.items() if isinstance(rule, Column | Fused)]
        norms = [c for c, rule in rules.items() if isinstance(rule, PerHead)]
        seen = {c: calls[c][0].output for c in (*columns, *norms)}
        fused = len(columns) == 1
        q, k, v = seen[columns[0]].chunk(3, -1) if fused else (seen[c] for c in columns)
        rotated = [seen[c] for c in norms] or [q, k]
        largest = [float(t.float().reshape(-1, head_dim).norm(dim=-1).max()) for t in rotated]
        magnitudes = torch.cat([q, k, v.abs()], -1) if fused else v.abs()
        values = seen | {columns[-1]: magnitudes}
        answers: dict[str, Callable[..., Any]] = {c: lambda *_, v=v, **__: v for c, v in values.items()}
        scale: list[Tensor] = []

        def end(x: Tensor) -> Tensor:
            scale.append(x.float())
            return x

        row = next(c for c, rule in rules.items() if isinstance(rule, Row))
        self._forward(name, answers | {row: end}, call)
        score = largest[0] * largest[1] / head_dim ** 0.5
        bound = bounds.attention(scale[0], score, head_dim, q.shape[-2], q.dtype, self.eager)
        if q.shape[-1] > self.plan.geometry.attention[self.attention[name]].q_heads * head_dim and not fused:
            bound = bound + bounds.elementwise(scale[0].to(q.dtype))  # times the sigmoid of a gate
        if (bound >= scale[0]).all():
            self.unproven.add(name)
        return bound
