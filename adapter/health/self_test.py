"""The test of every start: weights are finite, and one attention and one MLP of each stack compute what they must.

A random input goes through the sharded modules inside a real forward (so that positions, masks and lengths are the
model's own), which ends right after them. What comes out is held against Transformers' forward for one process on the
gathered heads, and against rows of the weights gathered from all ranks: adapter.verify.trace with another oracle.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.kernels.linear import FEW_ROWS, Quantised
from adapter.model.published import PublishedModules
from adapter.model.vision_data_parallel import data_parallel_of, encoder_of, features_of
from adapter.parallel.group import Group, to_device
from adapter.planning.plan import Plan
from adapter.verify import bounds
from adapter.verify.comparison import Comparison, Expected
from adapter.verify.precision import full_precision
from adapter.verify.trace import Trace, joined
from policies.errors import CheckFailed
from policies.formats import GROUP
from policies.rules import Claim, Experts, PerHead, Replicated, Row

log = logging.getLogger("adapter")
MOST_NAMED = 5  # tensors in one message
TOKENS, ROWS = 6, 16  # tokens of the probe; rows of a weight that are gathered


def skeletons(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Published name -> what the tested modules are for one process, without their weights. Call before injection."""
    modules = PublishedModules(model, plan.policy)
    found = dict[str, nn.Module]()
    for top in _tested(plan):
        skeleton = _weightless(modules[top])
        found |= {f"{top}.{name}".rstrip("."): module for name, module in skeleton.named_modules()}
    return found


def self_test(model: nn.Module, plan: Plan, tp: Group, skeleton: Mapping[str, nn.Module]) -> None:
    """Test the shards as they were loaded; every rank must call it.

    skeleton: what `skeletons` returned before the model was injected. Logs one line, or raises CheckFailed on every
    rank where a weight or an output is not finite (naming it and its dtype), or a module does not compute what one
    process does.
    """
    began, worst, wrong = time.perf_counter(), 0.0, list[Comparison]()
    _refuse_not_finite(tp, weights_not_finite(model, plan))
    eager = getattr(model.config, "_attn_implementation", "eager") == "eager"
    with torch.inference_mode(), full_precision():
        for stack, split in _modes(model, plan):
            tops = [top for top in _tested(plan) if top.startswith(f"{stack}.")]
            trace = Trace(model, plan, tp, skeleton, _expected, eager, only=tops, keep=frozenset(tops),
                          parameters=partial(_whole_parameters, model, plan, tp))
            with trace.watching():
                _run(model, plan, stack, tops, split)
            assert trace.comparisons, f"no module of {tops} ran"
            outputs = [f"the output of {name}, {x.dtype}" for name, x in trace.kept if not bool(x.isfinite().all())]
            _refuse_not_finite(tp, outputs)
            worst = max(worst, *(c.share for c in trace.comparisons))
            wrong += [first] if (first := trace.first_wrong()) else []
        _agree(tp, wrong)
        _check_finite(model, plan, tp)
    log.info("self-test: attention and MLP of both encoders hold on %d rank%s, largest error %.2g of its bound, "
             "%.0f ms", tp.size, "s" * (tp.size > 1), worst, (time.perf_counter() - began) * 1e3)


def _modes(model: nn.Module, plan: Plan) -> list[tuple[str, bool]]:
    """(stack, whether it runs split) of all tests: one for each mode of an encoder that is whole on every rank."""
    modes = {"tensor": (True,), "data": (False,), "auto": (False, True)}[plan.vision]
    return [(stack, split) for stack in plan.geometry.layers
            for split in (modes if plan.whole_encoder and stack == plan.policy.encoder.stack else (True,))]


def weights_not_finite(model: nn.Module, plan: Plan) -> list[str]:
    """Name every parameter, with its dtype, that holds a number which is not finite: of a quantised one the scales."""
    modules, found = PublishedModules(model, plan.policy), list[str]()
    for name, suffix in plan.parameters():
        held = modules.parameter(name, suffix)
        values = held.scales if isinstance(held, Quantised) else held
        if values.numel() and not bool(torch.stack(values.aminmax()).isfinite().all()):
            found.append(f"{name}.{suffix}, {values.dtype}")
    return found


def _refuse_not_finite(tp: Group, mine: list[str]) -> None:
    """Raise CheckFailed on every rank where something of one rank is not finite. mine: what is, of this rank."""
    if failed := _ranks_with(tp, bool(mine)):
        what = "; ".join(mine[:MOST_NAMED]) + (f" and {len(mine) - MOST_NAMED} more" if len(mine) > MOST_NAMED else "")
        raise CheckFailed(
            f"self-test failed on rank {failed}: not finite (infinity or NaN): {what or 'see that rank'}. Answers "
            "would mean nothing: float16 overflows above 65504, where bfloat16 does not (model.dtype); or the "
            "checkpoint is damaged, download it again")


def _ranks_with(tp: Group, flag: bool) -> str:
    """The ranks that raise a flag, in words; "" where none does. The same on every rank."""
    flags = tp.all_gather_last(to_device(torch.tensor([flag], dtype=torch.uint8)), (1,) * tp.size)
    return ", ".join(map(str, flags.nonzero().flatten().tolist()))


def _agree(tp: Group, wrong: list[Comparison]) -> None:
    """Raise CheckFailed on every rank where one rank found a comparison that does not hold. wrong: this rank's."""
    if not (failed := _ranks_with(tp, bool(wrong))):
        return
    what = "; ".join(f"{c.module}: {c.what}: error {c.error:.3g}, rounding explains {c.bound:.3g}"
                     + (f" (rank {', '.join(map(str, c.ranks))})" if c.ranks else "") for c in wrong)
    raise CheckFailed(
        f"self-test failed on rank {failed}{': ' + what if what else ''}. These shards do not compute what one process "
        "does, so nothing is served. Run launch/verify.py with this config: it names the tensors and modules")


def _tested(plan: Plan) -> list[str]:
    """The modules that end in a row-parallel linear or experts, of the first layer of each stack that has them: its
    attention and its MLP. They are in the order in which they run."""
    claims = [(c.module.partition(".*.")[0], plan.policy.modules(c, plan.geometry)) for c in plan.policy.table
              if isinstance(c.rule, Row | Experts)]
    tops = [(stack, modules[0].rpartition(".")[0]) for stack, modules in claims
            if modules and stack in plan.geometry.layers]
    return [top for stack, top in sorted(tops, key=lambda t: int(t[1].removeprefix(f"{t[0]}.").partition(".")[0]))]


def _weightless(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone.__dict__["_parameters"] = {
        name: p if p is None else nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), False)
        for name, p in module._parameters.items()
    }
    clone.__dict__["_modules"] = {name: m if m is None else _weightless(m) for name, m in module._modules.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        clone.__dict__[hooks] = OrderedDict()
    return clone


class _Enough(Exception):
    pass


def _run(model: nn.Module, plan: Plan, stack: str, tops: list[str], split: bool) -> None:
    """A forward of one encoder up to its first layer, whose tested modules get a random input."""
    seeded = torch.Generator().manual_seed(1)

    def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        def noise(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=seeded).to(x)

        if args:
            return (noise(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": noise(kwargs["hidden_states"])}

    def stop(*_: Any) -> None:
        raise _Enough

    published = PublishedModules(model, plan.policy)
    modules = [published[top] for top in tops]
    handles = [m.register_forward_pre_hook(probe, with_kwargs=True, prepend=True) for m in modules]
    handles.append(modules[-1].register_forward_hook(stop))
    try:
        with suppress(_Enough):
            _forward(model, plan, stack, split)
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, plan: Plan, stack: str, split: bool) -> Tensor:
    """Logits [1, TOKENS, vocab] of a few tokens, or the vision encoder's features of a small image."""
    device = next(model.parameters()).device
    if stack == plan.geometry.text_stack:
        ids = torch.arange(TOKENS, device=device)[None] % plan.geometry.sizes["vocab"]
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits
    values, merge = plan.geometry.patch_values, plan.geometry.merge_side
    side = 2 * merge
    pixels = torch.ones(side * side, values, device=device, dtype=model.dtype)  # type: ignore[call-overload]
    grid = torch.tensor([[1, side, side]], device=device)
    if parallel := data_parallel_of(model, plan):
        output = parallel.run(split, pixels, grid, {})
    else:
        output = encoder_of(model, plan)(pixels, **{plan.policy.encoder.grid: grid})
    return features_of(plan.policy.encoder, output)


def _check_finite(model: nn.Module, plan: Plan, tp: Group) -> None:
    """Raise CheckFailed on every rank where a forward through all layers of an encoder gives infinity or NaN."""
    bad = [f"a forward through {stack}, {model.dtype}" for stack, split in _modes(model, plan)
           if not _forward(model, plan, stack, split).isfinite().all()]
    _refuse_not_finite(tp, bad)


def _expected(plan: Plan, tp: Group, name: str, claim: Claim, layer: Any, x: Any) -> Iterator[Expected]:
    """Some outputs of a layer from its gathered weights: an adapter.verify.trace.Oracle. Own columns need no gather."""
    if isinstance(claim.rule, PerHead):
        yield _expected_norm(tp, layer, x)
        return
    if isinstance(claim.rule, Experts):
        yield _expected_of_experts(plan, tp, name, claim.rule, layer, x)
        return
    weight, bias = _own_part(plan, tp, name, layer)
    dim = 1 if isinstance(claim.rule, Row) else 0
    widths = tuple(plan.slice(name, "weight", r).local_shape[dim] for r in range(tp.size))
    x = x.reshape(-1, x.shape[-1]).float()
    count = weight.shape[0]
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(2))[:ROWS].to(x.device)
    weight, bias = weight[rows], None if bias is None else bias[rows].float()
    if dim == 1:
        weight = tp.all_gather_last(weight, widths)
    weight = weight.float()
    y = F.linear(x, weight, bias)
    scale = x.norm(dim=1)[:, None] * weight.norm(dim=1) + (0 if bias is None else bias.abs())
    parts, ranks = (y if bias is None else y - bias).abs(), 1
    if dim == 1:
        pairs = zip(x.split(widths, -1), weight.split(widths, -1), strict=True)
        parts, ranks = sum((F.linear(a, w).abs() for a, w in pairs), torch.zeros_like(y)), tp.size
    parts = parts if bias is None else parts + bias.abs()
    columns = rows if dim == 1 or isinstance(claim.rule, Replicated) else rows + sum(widths[: tp.rank])
    bound = bounds.linear(scale, parts, weight.shape[1], layer.weight.dtype, ranks)
    if isinstance(layer.weight, Quantised) and len(x) <= FEW_ROWS:
        bound = bound + bounds.coded_input(x, weight, GROUP)
    yield Expected(slice(None), columns, y, bound)


def _whole_parameters(model: nn.Module, plan: Plan, tp: Group, name: str) -> dict[str, Tensor]:
    """A module's own parameters (rules.InPlace), put together from all ranks: suffix -> tensor."""
    modules, found = PublishedModules(model, plan.policy), dict[str, Tensor]()
    for suffix in plan.claims[name].parameters():
        parts = [plan.slice(name, suffix, r) for r in range(tp.size)]
        last = modules.parameter(name, suffix).movedim(0, -1).contiguous()
        every = tp.all_gather_last(last, tuple(part.local_shape[0] for part in parts))
        found[suffix] = joined([part.ranges for part in parts], parts[0].shape[0], every).movedim(-1, 0).contiguous()
    return found


def _expected_norm(tp: Group, layer: Any, x: tuple[Tensor, ...]) -> Expected:
    """What a norm of each head must return with rank 0's weight, in float32 [tokens x heads, head_dim]. x: its input,
    and a gate where it has one."""
    exact, weight = _weightless(layer), tp.broadcast(layer.weight.clone()).float()
    exact.weight = nn.Parameter(weight, False)
    rows = [each.reshape(-1, each.shape[-1]).float() for each in x]
    y = type(layer).forward(exact, *rows)  # the class's own, whatever this layer's is
    return Expected(slice(None), None, y, bounds.norm(rows[0], y, weight, None, layer.weight.dtype))


def _expected_of_experts(plan: Plan, tp: Group, name: str, rule: Experts, layer: Any,
                         inputs: tuple[Tensor, Tensor, Tensor]) -> Expected:
    """What the experts of a layer must return, from what each rank holds of them, summed in float32."""
    first = plan.slice(name, "down_proj", tp.rank).ranges[0][0] if rule.by == "expert" else 0
    hidden, chosen, shares = inputs[0].float(), inputs[1], inputs[2].float()
    found = bounds.experts(hidden, chosen, shares, layer.gate_up_proj, layer.down_proj, layer.activation,
                           layer.down_proj.dtype, first)
    y, bound, parts = (tp.all_reduce(each) for each in found)
    summed = bounds.experts_summed(parts, chosen.shape[-1], tp.size, layer.down_proj.dtype)
    return Expected(slice(None), None, y, bound + summed)


def _own_part(plan: Plan, tp: Group, name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """What of a layer's weight and bias this rank computes with: all of it but in a whole encoder that runs split."""
    def own(suffix: str, held: Any) -> Any:
        part = plan.slice(name, suffix, tp.rank)
        if part.dim is None or held.shape == part.local_shape:
            return held
        return torch.cat([held.narrow(part.dim, a, b - a) for a, b in part.ranges], part.dim)

    bias = getattr(layer, "bias", None)  # a router has none
    return own("weight", layer.weight), None if bias is None else own("bias", bias)
