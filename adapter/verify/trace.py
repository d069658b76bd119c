"""Run a sharded model and hold every module's output against what one process computes from the same input.

Two kinds of module are checked, in the order in which they run, both against a *skeleton*: the model as Transformers
builds it for one process.

* Layers with weights: the whole input and the whole output are gathered; an oracle says what the output must be.
* Everything around them (attention, MLP, layer, encoder, model): Transformers' own forward of the skeleton's module is
  replayed on the arguments the sharded one got, with the observed outputs of its children given. So only its own part
  is computed: rotations and softmax, residuals, activations, masks, where picture features go. What it hands to each
  child and what it returns must be what was observed.

Between them they leave out nothing from input_ids to logits, and an error is charged to the module that made it.

A encoder that every rank holds whole reads other pictures on each (adapter.model.vision_data_parallel). What each
rank's share went through is run again, one share after the other, by all ranks together: rank 0 judges every module on
every share, all ranks must have its bits, and what the encoder had returned must be those features, each in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from adapter.checkpoint.digest import digest, unlike
from adapter.model.vision_data_parallel import ALONE, data_parallel_of
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.planning.vision_balance import Assignment
from adapter.verify import bounds
from policies.rules import Claim, Column, FusedQKV, Row, TensorSlice, expand


@dataclass(frozen=True)
class Check:
    """One comparison. share: largest |difference| / bound of all elements, above 1 the module is wrong; error and bound
    are those of that element; `ranks` those whose part it lies in, or that differ from the others."""

    order: float
    module: str
    what: str
    share: float
    error: float = 0.0
    bound: float = 0.0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What an oracle says of some elements of an output: [T, n] values, and how far they may be off; float32.

    tokens: which rows of the output, flattened to [T, out]; columns: which of its columns, None for all.
    """

    tokens: slice
    columns: Tensor | None
    values: Tensor
    bound: Tensor


@dataclass
class Call:
    """One call of a module, as one process would have seen it: whole inputs, whole output."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


Oracle = Callable[[Plan, Group, str, Claim, nn.Module, Tensor], Iterator[Expected]]


class Trace:
    """Hooks on `model`'s modules while it runs; every rank of the group must run it.

    skeleton: published name -> module of the one-process model; empty on ranks that only take part in the gathering.
    oracle: called on every rank for each layer with weights, with the plan of this call and the ranks that compute it
    together; it may use collectives.
    eager: whether attention rounds its scores to the dtype, as Transformers' "eager" does.
    only: modules to check with all that is in them; "" is the whole model.
    judging: entered on every rank around each comparison.
    keep: modules whose outputs are kept, in `kept`, for a caller that wants them (the layers of each stack).
    """

    def __init__(self, model: nn.Module, plan: Plan, tp: Group, skeleton: Mapping[str, nn.Module],
                 oracle: Oracle, eager: bool, only: Sequence[str] = ("",), keep: frozenset[str] = frozenset(),
                 judging: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.plan, self.tp, self.skeleton, self.oracle = plan, tp, skeleton, oracle
        self.eager, self.keep, self.judging = eager, keep, judging
        self.dealt = data_parallel_of(model, plan)
        self.ways: list[str] = []  # how each call of such a encoder went: "data" or "tensor"
        self._muted = False
        self.modules = {n: m for n, m in observed(model, plan).items() if any(_inside(n, top) for top in only)}
        self.children = _children(self.modules)
        self.attention = {name: row.encoder for row in plan.policy.head_numbers
                          for name in expand(row.module, plan.geometry.layers)}
        self.checks: list[Check] = []
        self.kept: list[tuple[str, Tensor]] = []
        self._frames: list[tuple[str, dict[str, list[Call]]]] = [("", {})]  # of each running module the calls it made
        self._order = 0
        self._digests: list[int] = []
        self._about: list[tuple[float, str, str]] = []  # of each digest: order, module, what
        self.unproven: set[str] = set()  # attention whose bound is no less than its values

    @contextmanager
    def watching(self) -> Iterator[Trace]:
        """Within, calls of the model are checked; at its end the ranks' copies of replicated values are compared."""
        handles = []
        for name, module in self.modules.items():
            hook = self._layer if name in self.plan.claims else self._dealt if self._is_dealt(module) else self._around
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(partial(self._leave, hook, name), with_kwargs=True))
        try:
            yield self
            self._compare_ranks()
        finally:
            for handle in handles:
                handle.remove()
            self._frames = [("", {})]

    def first_wrong(self) -> Check | None:
        return min((c for c in self.checks if not c.share <= 1), key=lambda c: c.order, default=None)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if not self._muted:
            self._frames.append((name, {}))
        self._muted |= self._is_dealt(module)

    def _leave(self, hook: Callable[..., None], name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._muted &= not self._is_dealt(module)
        if self._muted:
            return
        calls = self._frames.pop()[1]
        self._order += 1
        hook(name, module, args, kwargs, out, calls)

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *same: Any) -> Call:
        """Note a call. `same`: the inputs and outputs that every rank must hold bit for bit."""
        caller, calls = self._frames[-1]
        whats = (self._order - 0.5, caller, f"input of {name}"), (self._order, name, "output")
        self._digests += [digest(list(_tensors(part))) for part in same]
        self._about += whats
        call = Call(self._order, args, kwargs, _own(output))
        if self.skeleton:
            calls.setdefault(name, []).append(call)
        if name in self.keep and self.skeleton:
            self.kept.append((name, next(_tensors(output))))
        return call

    def _layer(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor, _: object) -> None:
        claim, (plan, tp) = self.plan.claims[name], self._cut(name)
        x, y = next(_tensors((args, kwargs))), output
        slots = getattr(module, "slots", None)
        replicated: tuple[Any, Any] = (x, y)
        if isinstance(claim.rule, Row) and tp.size > 1:
            local = x if slots is None else x.index_select(-1, slots)
            x = tp.all_gather_last(local, _widths(plan, name, 1))
            replicated = (None, y)
        elif isinstance(claim.rule, Column | FusedQKV) and tp.size > 1:
            local = y if slots is None else y.index_select(-1, slots)
            y = tp.all_gather_last(local, _widths(plan, name, 0))
            replicated = (x, None)
        whole = _assemble(plan, name, y) if isinstance(claim.rule, Column | FusedQKV) else y
        call = self._record(name, (x,), {}, whole, *replicated)
        flat = y.reshape(-1, y.shape[-1]) if len(claim.weight) < 3 else y.reshape(y.shape[0], -1)
        worst = Check(call.order, name, "output", 0.0)
        with self.judging():
            for part in self.oracle(plan, tp, name, claim, module, x):
                ours = flat[part.tokens] if part.columns is None else flat[part.tokens][:, part.columns]
                worst = max(worst, self._compare(ours, part, worst, plan, claim), key=lambda c: c.share)
        if self.skeleton:
            self.checks.append(worst)

    def _compare(self, ours: Tensor, part: Expected, base: Check, plan: Plan, claim: Claim) -> Check:
        share, error, bound, at = furthest(ours, part.values, part.bound)
        ranks: tuple[int, ...] = ()
        if isinstance(claim.rule, Column | FusedQKV) and share > 1 and plan.tp_size > 1:
            column = at[-1] if part.columns is None else int(part.columns[at[-1]])
            ends = torch.tensor(_widths(plan, base.module, 0)).cumsum(0)
            ranks = (int((ends <= column).sum()),)
        return Check(base.order, base.module, base.what, share, error, bound, ranks)

    def _around(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any,
                calls: dict[str, list[Call]]) -> None:
        """A module without weights of its own: rotary tables, or what surrounds layers that have some."""
        with self.judging():
            if self.skeleton:
                self._replay(name, self._order, args, kwargs, output, calls)
        named = dict(sorted(kwargs.items()))  # ranks may hold equal arguments in another order
        self._record(name, args, kwargs, output, (args, named), self._result(name, output))

    def _dealt(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any, _: object) -> None:
        """A encoder that is whole on every rank, when its ranks are through with what each had to read."""
        assert self.dealt
        patches, grid, others = self.dealt.bound(args, kwargs)
        deal, names = self.dealt.decide(grid), self.dealt.encoder
        self.ways.append("data" if deal else "tensor")
        sizes = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        pieces, kept, outs = patches.split(sizes), len(self.kept), list[Any]()
        shares = [list(share) for share in deal.shares if share] if deal else [list(range(len(sizes)))]
        self._frames.append((name, {}))
        for share in shares:
            part = (torch.cat([pieces[i] for i in share]), grid.new_tensor([[1, *deal.pieces[i]] for i in share])) \
                if deal else (patches, grid)
            self._frames.append((name, {}))
            outs.append(self.dealt.run(not deal, *part, others))
            arguments = dict(zip((names.patches, names.grid), part, strict=True)) | others
            self._leave(self._around, name, module, (), arguments, outs[-1])
        self._frames.pop()
        self._order += 1
        merge = self.dealt.merge ** 2
        tokens = [size // merge for size in sizes]
        again = _in_order(shares, [self.dealt.features(out) for out in outs], tokens)
        if self.skeleton:
            self._in_their_places(name, self.dealt.features(output), again, tokens, deal)
            layers = dict[str, list[Tensor]]()
            for layer, seen in self.kept[kept:]:
                layers.setdefault(layer, []).append(seen)
            self.kept[kept:] = [(layer, _in_order(shares, seen, sizes)) for layer, seen in layers.items()]
        self._record(name, args, kwargs, output, (args, dict(sorted(kwargs.items()))), output)

    def _in_their_places(self, name: str, ours: Tensor, again: Tensor, tokens: list[int],
                         deal: Assignment | None) -> None:
        self._compare_trees(self._order, name, "features of all pictures, in their order", ours, again, None)
        if deal and ours.shape == again.shape and not self.checks[-1].share <= 1:
            wrong = [not torch.equal(a, b) for a, b in zip(ours.split(tokens), again.split(tokens), strict=True)]
            ranks = tuple(r for r, share in enumerate(deal.shares) if any(wrong[i] for i in share))
            self.checks[-1] = replace(self.checks[-1], ranks=ranks)

    def _is_dealt(self, module: nn.Module) -> bool:
        return self.dealt is not None and getattr(module, "dealt", None) is self.dealt

    def _cut(self, name: str) -> tuple[Plan, Group]:
        """How a module is cut in the call that is under way, and the ranks that compute it together."""
        if self.dealt is None or not self.plan.in_encoder(name):
            return self.plan, self.tp
        return (self.plan.divided, self.tp) if self.dealt.switch.split else (self.plan.alone, ALONE)

    def _result(self, name: str, output: Any) -> Any:
        """What counts of an output: attention may add the scores of this rank's own heads."""
        return next(_tensors(output)) if name in self.attention else output

    def _replay(self, name: str, order: int, args: Any, kwargs: Any, output: Any, calls: dict[str, list[Call]]) -> None:
        encoder = self.attention.get(name)
        given = {child: list(calls.get(child, ())) for child in {**calls, **dict.fromkeys(self.children[name])}}

        def answer(child: str, *got: Any, **named: Any) -> Any:
            if not given[child]:
                self.checks.append(Check(order, name, f"does not call {child} where one process does", torch.inf))
                raise _Astray
            call = given[child].pop(0)
            if child in self.plan.claims:  # its input was noted alone
                got, named = (next(_tensors((got, named))),), {}
            limit: Callable[[], Tensor] | None = None
            if child in self.plan.claims and isinstance(self.plan.claims[child].rule, Row):
                limit = (partial(bounds.elementwise, call.args[0]) if encoder is None else
                         partial(self._attention_bound, name, encoder, args, kwargs, calls))
            self._compare_trees(call.order - 0.5, name, f"input of {child}", (call.args, call.kwargs), (got, named),
                                limit)
            return _own(call.output)

        try:
            result = self._forward(name, {child: partial(answer, child) for child in given}, args, kwargs)
        except _Astray:
            return
        self._compare_trees(order, name, "output", self._result(name, output), self._result(name, result), None)
        self.checks += [Check(order, name, f"calls {child} where one process does not", torch.inf)
                        for child, left in given.items() if left]

    def _forward(self, name: str, answers: Mapping[str, Callable[..., Any]], args: Any, kwargs: Any) -> Any:
        module = self.skeleton[name]
        targets = {self.skeleton[child]: answer for child, answer in answers.items()}
        before = {target: target.__dict__.pop("forward", None) for target in targets}  # a bound replays within a replay
        for target, answer in targets.items():
            target.forward = answer
        try:
            return module(*_own(args), **_own(kwargs))
        finally:
            for target, answer in before.items():
                del target.forward
                if answer is not None:
                    target.forward = answer

    def _compare_trees(self, order: float, name: str, what: str, ours: Any, theirs: Any,
                       limit: Callable[[], Tensor] | None) -> None:
        a, b = list(_tensors(ours)), list(_tensors(theirs))
        if [t.shape for t in a] != [t.shape for t in b]:
            self.checks.append(Check(order, name, f"{what} has shapes {[list(t.shape) for t in a]}, one process's "
                                     f"{[list(t.shape) for t in b]}", torch.inf))
            return
        worst = Check(order, name, what, 0.0)
        for mine, one in zip(a, b, strict=True):
            if torch.equal(mine, one):
                continue
            bound = limit() if limit else torch.zeros(one.shape)  # the same operations on the same bits
            share, error, at_most, _ = furthest(mine, one, bound.to(one.device))
            worst = max(worst, Check(order, name, what, share, error, at_most), key=lambda c: c.share)
        self.checks.append(worst)

    def _attention_bound(self, name: str, encoder: str, args: Any, kwargs: Any, calls: dict[str, list[Call]]) -> Tensor:
        """bounds.attention for the observed q, k and v, which the policies state in this order."""
        head_dim = self.plan.geometry.attention[encoder].head_dim
        linears = [c for c in self.children[name] if c in self.plan.claims]  # old releases keep a rotary table here
        columns = [c for c in linears if not isinstance(self.plan.claims[c].rule, Row)]
        seen = {c: calls[c][0].output for c in columns}
        fused = len(columns) == 1
        q, k, v = seen[columns[0]].chunk(3, -1) if fused else (seen[c] for c in columns)
        largest = [float(t.float().unflatten(-1, (-1, head_dim)).norm(dim=-1).max()) for t in (q, k)]
        magnitudes = torch.cat([q, k, v.abs()], -1) if fused else v.abs()
        values = seen | {columns[-1]: magnitudes}
        answers: dict[str, Callable[..., Any]] = {c: lambda *_, v=v, **__: v for c, v in values.items()}
        scale: list[Tensor] = []

        def end(x: Tensor) -> Tensor:
            scale.append(x.float())
            return x

        row = next(c for c in linears if c not in columns)
        self._forward(name, answers | {row: end}, args, kwargs)
        score = largest[0] * largest[1] / head_dim ** 0.5
        bound = bounds.attention(scale[0], score, head_dim, q.shape[-2], q.dtype, self.eager)
        if (bound >= scale[0]).all():
            self.unproven.add(name)
        return bound

    def _compare_ranks(self) -> None:
        """Replicated inputs and outputs must be the same bits on every rank."""
        mine = torch.tensor(self._digests, device=get_accelerator().current_device_name())
        rows = self.tp.all_gather_last(mine, (len(mine),) * self.tp.size).view(self.tp.size, -1)
        for i in (rows != rows[0]).any(0).nonzero().flatten().tolist():
            order, name, what = self._about[i]
            self.checks.append(Check(order, name, f"{what} differs between ranks", torch.inf,
                                     ranks=unlike(rows[:, i].tolist())))


class _Astray(Exception):
    """The skeleton calls a module that the sharded one did not; there is nothing to answer."""


def observed(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Published name -> module, for every module that has weights or buffers in or below it and that is called.
    Quantised weights are no parameters: those the table claims count by their names."""
    found = {}
    around = {claim[:i] for claim in plan.claims for i in range(len(claim) + 1) if claim[i:i + 1] in ("", ".")}
    for name, module in model.named_modules():
        published = plan.policy.published(name)
        is_called = type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList)
        holds = published in around or next(chain(module.parameters(), module.buffers()), None) is not None
        if is_called and holds:
            found[published] = module
    return found


def _widths(plan: Plan, name: str, dim: int) -> tuple[int, ...]:
    """Elements of the cut dimension that each rank computes with."""
    return tuple(plan.slice(name, "weight", r).local_shape[dim] for r in range(plan.tp_size))


def _assemble(plan: Plan, name: str, y: Tensor) -> Tensor:
    """All ranks' outputs side by side -> the whole output; of a replicated KV head the last copy is taken."""
    parts = [plan.slice(name, "weight", r) for r in range(plan.tp_size)]
    whole = y.new_zeros(*y.shape[:-1], parts[0].shape[0])
    for part, piece in zip(parts, y.split(_widths(plan, name, 0), -1), strict=True):
        at = 0
        for start, stop in part.ranges:
            whole[..., start:stop] = piece[..., at:at + stop - start]
            at += stop - start
    return whole


def _in_order(shares: list[list[int]], outputs: list[Tensor], sizes: list[int]) -> Tensor:
    """The outputs [rows, n] of each share, `sizes[i]` rows for piece i -> one of all pieces in order."""
    rows = dict[int, Tensor]()
    for share, output in zip(shares, outputs, strict=True):
        rows |= zip(share, output.split([sizes[i] for i in share]), strict=True)
    assert sorted(rows) == list(range(len(sizes))), shares
    return torch.cat([rows[i] for i in range(len(sizes))])


def _inside(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _children(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Module -> the observed ones below it with no other between, in order."""
    at = {id(module): name for name, module in modules.items()}
    out: dict[str, list[str]] = {}

    def below(module: nn.Module) -> Iterator[str]:
        for child in module.children():
            if id(child) in at:
                yield at[id(child)]
            else:
                yield from below(child)

    for name, module in modules.items():
        out[name] = list(below(module))
    return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings (ModelOutput is one) and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _own(tree: Any) -> Any:
    """The same tensors in containers of our own: Transformers changes outputs in place after a module returned them."""
    if isinstance(tree, Mapping):
        clone = copy.copy(tree)
        for key, value in tree.items():
            clone[key] = _own(value)  # type: ignore[index]
        return clone
    return type(tree)(map(_own, tree)) if type(tree) in (tuple, list) else tree


def furthest(ours: Tensor, values: Tensor, bound: Tensor) -> tuple[float, float, float, tuple[int, ...]]:
    """(share, error, bound, index) of the element whose |difference| is the largest share of its bound. A NaN on one
    side only is infinitely far."""
    if not ours.numel():
        return 0.0, 0.0, 0.0, ()
    a, b = ours.float(), values.float()
    same = (a == b) | (a.isnan() & b.isnan())
    if ours.dtype is torch.float16:  # what it cannot hold, one process cannot either
        same |= a.isinf() & (a.sign() == b.sign()) & (b.abs() + bound >= torch.finfo(torch.float16).max)
    error = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    share = torch.where(same, 0.0, error / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = int(share.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), share.shape))
    return float(share.flatten()[at]), float(error.flatten()[at]), float(bound.flatten()[at]), index


def take(t: Tensor, part: TensorSlice) -> Tensor:
    """The ranges of a slice, along the last dimension."""
    return torch.cat([t[..., a:b] for a, b in part.ranges], -1)
