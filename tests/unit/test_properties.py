"""The arithmetic of policies/ over any geometry of both encoders, and that what a rank holds is what the plan says.

Geometries, tp sizes and even the table's biases are drawn. test_policies.py has the same for geometries that exist.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from checkpoints import Shape, random_tensor
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapter.model.inject import inject
from adapter.model.meta_init import build_on_meta
from adapter.parallel.group import Group
from adapter.planning.plan import DTYPE_BYTES, Plan, valid_tp_sizes
from policies.families.qwen2_vl import POLICY, TABLE
from policies.policy import Geometry, Policy
from policies.rules import Claim, Replicated, Row, TensorSlice

any_example = settings(deadline=None, derandomize=True, max_examples=60)
shapes = st.builds(
    lambda kv_heads, group, **rest: Shape(heads=kv_heads * group, kv_heads=kv_heads, **rest),
    st.integers(1, 5), st.integers(1, 7), head_dim=st.sampled_from([2, 4, 6, 8]), layers=st.integers(1, 2),
    mlp=st.integers(1, 700), vocab=st.integers(1, 400), tied=st.booleans(), v_heads=st.integers(1, 9),
    v_head_dim=st.sampled_from([4, 8]), v_layers=st.integers(1, 2),
)


@st.composite
def tables(draw) -> tuple[Claim, ...]:
    """The family's table with biases given to any layer that could have one, and taken from any that has."""
    def altered(claim: Claim) -> Claim:
        linear = len(claim.weight) == 2 and claim.module not in ("model.embed_tokens", "lm_head")
        return replace(claim, bias=(claim.weight[0],) if draw(st.booleans()) else None) if linear else claim
    return tuple(altered(claim) for claim in TABLE)


@st.composite
def plans(draw) -> Plan:
    policy: Policy = replace(POLICY, table=draw(tables()))
    geometry: Geometry = policy.geometry(draw(shapes).config())
    sizes = valid_tp_sizes(policy, geometry)
    assume(sizes)
    return Plan(policy, geometry, draw(st.sampled_from(sizes)), draw(st.sampled_from(sorted(DTYPE_BYTES))))


def index_of(part: TensorSlice) -> tuple:
    """A slice as a numpy or torch index."""
    if part.dim is None:
        return ()
    return (*[slice(None)] * part.dim, np.concatenate([np.arange(a, b) for a, b in part.ranges]))


@dataclass(frozen=True)
class Entry:
    """One tensor of the table, with every rank's slice."""

    name: str
    claim: Claim
    suffix: str
    parts: list[TensorSlice]

    @property
    def declared_whole(self) -> bool:
        """Held by every rank as it stands: the rule says so, or it is a bias that is added after the sum."""
        return isinstance(self.claim.rule, Replicated) or (isinstance(self.claim.rule, Row) and self.suffix == "bias")


def rows(plan: Plan) -> Iterator[Entry]:
    """Every tensor of the table, the tied copy of the head included."""
    for module, claim in plan.claims.items():
        for suffix in claim.parameters():
            parts = [plan.slice(module, suffix, rank) for rank in range(plan.tp_size)]
            yield Entry(f"{module}.{suffix}", claim, suffix, parts)


def readers(plan: Plan) -> np.ndarray:
    """[KV heads]: how many ranks own a query head that reads each, counted head by head."""
    text = plan.geometry.attention["text"]
    group = text.q_heads // text.kv_heads
    reads = [{head // group for head in range(*shard.q)} for shard in plan.heads["text"]]
    return np.array([sum(kv in some for some in reads) for kv in range(text.kv_heads)])


@any_example
@given(plans())
def test_the_slices_of_all_ranks_together_are_the_identity(plan):
    """Every element is owned, and put back where it came from it is in its place, once but for declared replicas."""
    kv_dim = plan.geometry.attention["text"].head_dim
    inventory = plan.policy.inventory(plan.geometry)
    for row in rows(plan):
        shape = inventory.pop(row.name)
        whole = np.arange(math.prod(shape)).reshape(shape)
        back, copies = np.full_like(whole, -1), np.zeros_like(whole)
        for part in row.parts:
            index = index_of(part)
            assert part.shape == shape and whole[index].shape == part.local_shape, row.name
            assert part.dim is None or len(set(index[-1].tolist())) == len(index[-1]), (row.name, "twice on one rank")
            back[index] = whole[index]
            copies[index] += 1
        assert (back == whole).all(), row.name
        if row.declared_whole:
            expected: np.ndarray | int = plan.tp_size
        elif row.claim.weight[0] == "kv":
            expected = np.repeat(readers(plan), kv_dim).reshape(-1, *[1] * (len(shape) - 1))
        else:
            expected = 1
        assert (copies == expected).all(), row.name
    assert not inventory


@any_example
@given(plans())
def test_every_rank_is_busy_and_none_is_much_busier(plan):
    """No rank goes without query heads, MLP or vocabulary; vision heads may be fewer than ranks, and then as even."""
    for encoder, attention in plan.geometry.attention.items():
        owned = [shard.owned for shard in plan.heads[encoder]]
        assert sum(owned) == attention.q_heads
        assert max(owned) == math.ceil(attention.q_heads / plan.tp_size)
        assert encoder == "vision" or min(owned) > 0
    for axis in ("mlp", "v_mlp", "merger", "vocab"):
        widths = [stop - start for start, stop in plan.splits[axis].ranges]
        assert min(widths) > 0
        mean = plan.geometry.sizes[axis] / plan.tp_size
        assert max(widths) <= max(1.05 * mean, math.ceil(mean)), (axis, widths)
    for row in rows(plan):
        if not row.declared_whole and not row.claim.module.startswith("visual.blocks.*.attn"):
            assert all(math.prod(part.local_shape) for part in row.parts), row.name


@any_example
@given(plans())
def test_attention_is_cut_between_heads_and_never_within_one(plan):
    for row in rows(plan):
        cut_by_heads = row.claim.rule.axis(row.claim.weight) in ("q", "kv", "v_q") if not row.declared_whole else False
        dim = plan.geometry.attention["vision" if row.claim.module.startswith("visual") else "text"].head_dim
        for part in row.parts if cut_by_heads else ():
            assert all(start % dim == 0 and stop % dim == 0 for start, stop in part.ranges), row.name
    for encoder in plan.heads:
        for before, after in zip(plan.heads[encoder], plan.heads[encoder][1:], strict=False):
            assert before.q[1] == after.q[0]


@any_example
@given(plans(), st.integers(0, 2**32 - 1))
def test_what_meets_inside_a_layer_is_cut_alike(plan, seed):
    """In whole numbers: the sum over ranks of rows @ (columns @ x + bias), and the bias once, is the whole layer."""
    rng = np.random.default_rng(seed)
    tensors = {row.name: (row, rng.integers(-9, 10, row.parts[0].shape)) for row in rows(plan)}

    def bias_of(module: str, rank: int | None) -> np.ndarray | int:
        if f"{module}.bias" not in tensors:
            return 0
        row, whole = tensors[f"{module}.bias"]
        return whole if rank is None else whole[index_of(row.parts[rank])]

    pairs = [("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
             ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
             ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"),
             ("visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc2"), ("visual.merger.mlp.0", "visual.merger.mlp.2")]
    for first, second in pairs:
        (column, a), (row, b) = tensors[f"{first}.weight"], tensors[f"{second}.weight"]
        x = rng.integers(-9, 10, a.shape[1])
        whole = b @ (a @ x + bias_of(first, None)) + bias_of(second, None)
        parts = [b[index_of(row.parts[r])] @ (a[index_of(column.parts[r])] @ x + bias_of(first, r))
                 for r in range(plan.tp_size)]
        assert (sum(parts) + bias_of(second, plan.tp_size - 1) == whole).all(), (first, second)


@any_example
@given(plans())
def test_the_plans_bytes_are_those_of_the_slices_and_of_declared_replicas(plan):
    item = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[plan.dtype]
    of_tied = plan.policy.tied[0] if plan.geometry.tied else None
    kept = [row for row in rows(plan) if row.name != of_tied]
    for rank in range(plan.tp_size):
        assert plan.weight_bytes(rank) == item * sum(math.prod(row.parts[rank].local_shape) for row in kept)
    text = plan.geometry.attention["text"]
    extra_heads = int(readers(plan).sum()) - text.kv_heads
    whole = sum(math.prod(row.parts[0].shape) for row in kept)
    replicas = sum((plan.tp_size - 1) * math.prod(row.parts[0].shape) for row in kept if row.declared_whole)
    replicas += sum(extra_heads * math.prod(row.parts[0].shape) // text.kv_heads for row in kept
                    if row.claim.weight[0] == "kv")
    assert sum(map(plan.weight_bytes, range(plan.tp_size))) == item * (whole + replicas)


# What a rank really holds

@st.composite
def models(draw) -> tuple[Shape, int]:
    """A geometry as Transformers can build it, and a tp size with ranks of every sort; few elements, few ranks."""
    shape = draw(shapes.filter(lambda s: s.heads <= 14))
    shape = replace(shape, layers=1, v_layers=1, head_dim=draw(st.sampled_from([4, 8])))
    sizes = [n for n in valid_tp_sizes(POLICY, POLICY.geometry(shape.config())) if n <= 5]
    assume(sizes)
    return shape, draw(st.sampled_from(sizes))


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_rank_holds_the_bytes_of_its_plan_and_all_ranks_the_model(tmp_path, model, dtype):
    """Built and injected for each rank in turn, without a group: no collective is part of it."""
    shape, tp_size = model
    (tmp_path / "config.json").write_text(json.dumps(shape.config()))
    plan = Plan(POLICY, POLICY.geometry(shape.config()), tp_size, str(dtype).removeprefix("torch."))
    whole = {name: random_tensor(name, size).to(dtype) for name, size in shape.tensors().items()}
    back = {name: torch.full_like(tensor, math.nan) for name, tensor in whole.items()}

    def source(name: str, part: TensorSlice) -> Tensor:
        return whole[name][index_of(part)].clone()

    for rank in range(tp_size):
        built = build_on_meta(tmp_path, POLICY, dtype, "sdpa")
        inject(built, plan, Group(rank, tp_size), source, dtype)
        held = {id(p): p for p in built.parameters()}.values()
        assert sum(p.untyped_storage().nbytes() for p in held) == plan.weight_bytes(rank)
        for name, parameter in built.named_parameters():
            published = POLICY.published(name)
            back[published][index_of(plan.slice(*published.rsplit(".", 1), rank))] = parameter.detach()
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_the_bytes_of_a_dtype_are_torchs(dtype):
    assert DTYPE_BYTES[dtype] == getattr(torch, dtype).itemsize
