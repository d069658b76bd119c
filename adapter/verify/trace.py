"""Run a sharded model and hold every module's output against what one process computes from the same input.

Two kinds of module are checked, in the order in which they run, both against a *skeleton*: the model as Transformers
builds it for one process.

* Layers with weights: the whole input and the whole output are gathered; an oracle says what the output must be.
* Everything around them (attention, MLP, layer, encoder, model): adapter.verify.replay runs Transformers' own forward
  of the skeleton's module on the arguments that the sharded one got.

Between them they leave out nothing from input_ids to logits, and an error is charged to the module that made it. A
vision encoder that every rank holds whole has a tracer of its own: adapter.verify.encoder_trace.

Inputs and outputs that every rank must hold alike are compared between the ranks, bit for bit, once the ranks have
agreed that they ran the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from adapter.checkpoint.digest import digest, unlike
from adapter.model.layers import slot_index
from adapter.model.published import PublishedModules
from adapter.model.vision_data_parallel import data_parallel_of
from adapter.parallel.group import Group, exchange
from adapter.planning.plan import Plan
from adapter.verify.comparison import (
    Comparison,
    Expected,
    furthest,
    holding,
    tensors_in,
    with_own_containers,
)
from adapter.verify.encoder_trace import EncoderTrace
from adapter.verify.replay import Call, Calls, Replayer
from policies.errors import CheckFailed
from policies.rules import Claim, Column, Experts, Fused, InPlace, PerHead, Range, Row

OUTPUT = "output"  # what a digest is of, where it is not an input
# of a layer's inputs the one that there is; where there may be several (rules.Experts, PerHead), a tuple of all
Oracle = Callable[[Plan, Group, str, Claim, nn.Module, Any], Iterator[Expected]]


class Trace:
    """Hooks on `model`'s modules while it runs; every rank of the group must run it.

    skeleton: published name -> module of the one-process model; empty on ranks that only take part in the gathering.
    oracle: called on every rank for each layer with weights, with the plan of this call and the ranks that compute it
    together; it may use collectives.
    eager: whether attention rounds its scores to the dtype, as Transformers' "eager" does.
    only: modules to check with all that is in them; "" is the whole model.
    judging: entered on every rank around each comparison.
    keep: modules whose outputs are kept, in `kept`, for a caller that wants them (the layers of each stack).
    parameters: called on every rank with the name of each module whose claim is rules.InPlace; gives rank 0 its whole
    parameters. It may use collectives.
    """

    def __init__(self, model: nn.Module, plan: Plan, tp: Group, skeleton: Mapping[str, nn.Module],
                 oracle: Oracle, eager: bool, only: Sequence[str] = ("",), keep: frozenset[str] = frozenset(),
                 judging: Callable[[], AbstractContextManager[None]] = nullcontext,
                 parameters: Callable[[str], Mapping[str, Tensor]] = lambda _: {}) -> None:
        self.plan, self.tp, self.skeleton, self.oracle = plan, tp, skeleton, oracle
        self.keep, self.judging, self.parameters = keep, judging, parameters
        self.modules = {n: m for n, m in observed(model, plan).items() if any(_inside(n, top) for top in only)}
        self.replayer = Replayer(skeleton, plan, _children(self.modules), eager)
        shared = data_parallel_of(model, plan)
        self.encoder = EncoderTrace(self, shared) if shared else None
        self.comparisons: list[Comparison] = []
        self.kept: list[tuple[str, Tensor]] = []
        self.order = 0  # of the module that ended last
        self._callers: list[tuple[str, Calls]] = [("", {})]  # of each running module the calls that it made so far
        self._suspended = False  # while ranks read images of their own, nothing can be gathered
        self._digests: list[int] = []
        self._about: list[tuple[float, str, str]] = []  # of each digest: order, module, what

    @contextmanager
    def watching(self) -> Iterator[Trace]:
        """Within, calls of the model are checked; at its end the ranks' copies of replicated values are compared.
        Raises CheckFailed on every rank where the ranks did not run the same modules."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(partial(self._leave, name), with_kwargs=True))
        try:
            yield self
            self._compare_ranks()
        finally:
            for handle in handles:
                handle.remove()
            self._callers = [("", {})]

    @property
    def encoder_modes(self) -> list[str]:
        """How each call of an encoder that every rank holds whole ran: "data" or "tensor"."""
        return self.encoder.modes if self.encoder else []

    def first_wrong(self) -> Comparison | None:
        """The comparison that failed in the module that ran first."""
        return min((c for c in self.comparisons if not c.holds), key=lambda c: c.order, default=None)

    @contextmanager
    def calls_of(self, name: str) -> Iterator[Calls]:
        """Within, modules that run count as called by `name`; yields those calls."""
        calls: Calls = {}
        self._callers.append((name, calls))
        try:
            yield calls
        finally:
            self._callers.pop()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if not self._suspended:
            self._callers.append((name, {}))
        self._suspended |= self._is_shared_encoder(module)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        shared = self._is_shared_encoder(module)
        if self._suspended and not shared:
            return
        self._suspended = False
        _, calls = self._callers.pop()
        if shared:
            assert self.encoder
            self.encoder.compare(name, args, kwargs, output)
        elif name in self.plan.claims and not self._is_in_place(name):
            self._compare_layer(name, module, args, kwargs, output)
        else:
            self.compare_around(name, args, kwargs, output, calls)

    def _is_in_place(self, name: str) -> bool:
        """Whether a module has parameters of its own, and others inside, which it calls."""
        return name in self.plan.claims and isinstance(self.plan.claims[name].rule, InPlace)

    def _is_shared_encoder(self, module: nn.Module) -> bool:
        return self.encoder is not None and self.encoder.runs(module)

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *same: Any) -> None:
        """Note a call that ended, whole, for the module that made it. same: what every rank must hold bit for bit."""
        caller, calls = self._callers[-1]
        self._digests += [digest(list(tensors_in(part))) for part in same]
        self._about += [(self.order - 0.5, caller, f"input of {name}"), (self.order, name, OUTPUT)]
        if self.skeleton:
            calls.setdefault(name, []).append(Call(self.order, args, kwargs, with_own_containers(output)))
        if name in self.keep and self.skeleton:
            self.kept.append((name, next(tensors_in(output))))

    def _compare_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A layer with weights: its output against the oracle's."""
        self.order += 1
        claim, (plan, tp) = self.plan.claims[name], self._cut(name)
        by_columns = isinstance(claim.rule, Column | Fused)
        inputs = tuple(tensors_in((args, kwargs)))
        x: Any = inputs if isinstance(claim.rule, Experts | PerHead) else inputs[0]
        y = next(tensors_in(output))  # of a router's outputs its logits
        slots = getattr(module, "slots", None)
        replicated: tuple[Any, Any] = (x, output)
        if isinstance(claim.rule, Row) and tp.size > 1:
            local = x if slots is None else x.index_select(-1, slots)
            x = tp.all_gather_last(local, _widths(plan, name, 1))
            replicated = (None, output)
        elif by_columns and tp.size > 1:
            local = y if slots is None else y.index_select(-1, slots)
            y = tp.all_gather_last(local, _widths(plan, name, 0))
            replicated = (x, None)
        elif isinstance(claim.rule, PerHead) and tp.size > 1:
            *heads, y = (_all_heads(plan, tp, claim.rule, t) for t in (*inputs, y))
            x = tuple(heads)
            replicated, output = (None, None), y
        whole = _assemble(plan, name, y) if by_columns else output
        self.record(name, x if isinstance(x, tuple) else (x,), {}, whole, *replicated)
        flat = y.reshape(-1, y.shape[-1]) if len(claim.weight) < 3 else y.reshape(y.shape[0], -1)
        worst = Comparison(self.order, name, "output", 0.0)
        with self.judging():
            for part in self.oracle(plan, tp, name, claim, module, x):
                ours = flat[part.tokens] if part.columns is None else flat[part.tokens][:, part.columns]
                found = self._compare_part(ours, part, worst, plan, by_columns)
                worst = max(worst, found, key=lambda c: c.share)
        if self.skeleton:
            self.comparisons.append(worst)

    def _compare_part(self, ours: Tensor, part: Expected, base: Comparison, plan: Plan, by_columns: bool) -> Comparison:
        share, error, bound, at = furthest(ours, part.values, part.bound)
        ranks: tuple[int, ...] = ()
        if by_columns and share > 1 and plan.tp_size > 1:
            column = at[-1] if part.columns is None else int(part.columns[at[-1]])
            ends = torch.tensor(_widths(plan, base.module, 0)).cumsum(0)
            ranks = (int((ends <= column).sum()),)
        return Comparison(base.order, base.module, base.what, share, error, bound, ranks)

    def compare_around(self, name: str, args: Any, kwargs: Any, output: Any, calls: Calls) -> None:
        """A module without weights of its own, by a replay: rotary tables, or what surrounds layers with weights."""
        self.order += 1
        with self.judging():
            weights = self.parameters(name) if self._is_in_place(name) else {}
            if self.skeleton:
                with holding(self.skeleton[name], weights):
                    self.comparisons += self.replayer.compare(name, Call(self.order, args, kwargs, output), calls)
        named = dict(sorted(kwargs.items()))  # ranks may hold equal arguments in another order
        self.record(name, args, kwargs, output, (args, named), self.replayer.result(name, output))

    def _cut(self, name: str) -> tuple[Plan, Group]:
        """How a module is cut in the call that is under way, and the ranks that compute it together."""
        if self.encoder is None or not self.plan.in_encoder(name):
            return self.plan, self.tp
        return self.encoder.cut(self.tp)

    def _compare_ranks(self) -> None:
        """Replicated inputs and outputs must be the same bits on every rank. Raises CheckFailed on every rank where the
        ranks did not run the same modules."""
        self._require_same_modules()
        if not self._digests:
            return
        ranks = self.tp.gather_integers(self._digests)
        for (order, name, what), digests in zip(self._about, zip(*ranks, strict=True), strict=True):
            if len(set(digests)) > 1:
                self.comparisons.append(Comparison(order, name, f"{what} differs between ranks", torch.inf,
                                                   ranks=unlike(digests)))

    def _require_same_modules(self) -> None:
        """Gather two int64s of each rank: how many digests it has, and a digest of the modules that it ran. The modules
        are exchanged only where these differ. Raises CheckFailed."""
        ran = [name for _, name, what in self._about if what == OUTPUT]
        summaries = self.tp.gather_integers([len(self._digests), digest(ran)])
        if any(summary != summaries[0] for summary in summaries):
            every = exchange(self.tp, {"ran": ran})
            raise CheckFailed(_other_modules([tuple(facts["ran"]) for facts in every]))


def _other_modules(ranks: Sequence[tuple[str, ...]]) -> str:
    """Name each rank that did not run what most ranks ran, and the first module where it parts from them."""
    odd = unlike(ranks)
    usual = next(rank for rank in range(len(ranks)) if rank not in odd)
    lines = []
    for rank in odd:
        pairs = list(zip_longest(ranks[rank], ranks[usual]))
        after = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
        mine, theirs = (repr(name) if name is not None else "nothing more" for name in pairs[after])
        lines.append(f"rank {rank} ran {mine} after {after} modules, rank {usual} ran {theirs}")
    return ("the ranks did not run the same modules, so what they computed cannot be compared: " + "; ".join(lines)
            + ". Something on one rank alone (a hook, a replaced forward, a condition on the rank) decides what runs; "
              "give every rank the same model")


def observed(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Published name -> module, for every module that has weights or buffers in or below it and that is called.
    Quantised weights are no parameters: those the table claims count by their names."""
    found = {}
    around = {claim[:i] for claim in plan.claims for i in range(len(claim) + 1) if claim[i:i + 1] in ("", ".")}
    for name, module in PublishedModules(model, plan.policy).items():
        is_called = type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList)
        holds = name in around or next(chain(module.parameters(), module.buffers()), None) is not None
        if is_called and holds:
            found[name] = module
    return found


def _widths(plan: Plan, name: str, dim: int) -> tuple[int, ...]:
    """Elements of the cut dimension that each rank computes with."""
    return tuple(plan.slice(name, "weight", r).local_shape[dim] for r in range(plan.tp_size))


def _assemble(plan: Plan, name: str, y: Tensor) -> Tensor:
    """All ranks' outputs side by side -> the whole output; of a replicated KV head the last copy is taken."""
    parts = [plan.slice(name, "weight", r) for r in range(plan.tp_size)]
    return joined([part.ranges for part in parts], parts[0].shape[0], y)


def _all_heads(plan: Plan, tp: Group, rule: PerHead, heads: Tensor) -> Tensor:
    """This rank's heads [*, slots, head_dim], or [tokens x slots, head_dim] -> those of all ranks in their order,
    [*, heads, head_dim] or [tokens x heads, head_dim]."""
    encoder, kind = plan.policy.head_axes[rule.part]
    shard, split, rows = plan.heads[encoder][tp.rank], plan.splits[rule.part], plan.policy.rows_of_a_head(
        rule.part, plan.geometry)
    local = heads.reshape(-1, rows * (shard.slots if kind == "q" else shard.kv_heads))
    if kind == "q" and shard.padded_q:
        local = local.index_select(-1, slot_index(shard.q_slots, rows).to(local.device))
    every = tp.all_gather_last(local, tuple(stop - start for start, stop in split.ranges))
    whole = joined([(owned,) for owned in split.ranges], split.size, every)
    return whole.view(*heads.shape[:-2], -1, heads.shape[-1])


def joined(ranges: Sequence[Sequence[Range]], size: int, y: Tensor) -> Tensor:
    """The parts of all ranks, side by side in y, each in its place of the last dimension, `size` wide."""
    whole, at = y.new_zeros(*y.shape[:-1], size), 0
    for start, stop in chain.from_iterable(ranges):
        whole[..., start:stop] = y[..., at:at + stop - start]
        at += stop - start
    return whole


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
