"""Predictions: arithmetic by hand, limits and order, and what ranks get of a machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from checkpoints import Shape
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published import PUBLISHED

from adapter.planning.cost_model import Work, Workload, predict, predict_all, text_work, vision_work
from adapter.planning.hardware import Hardware
from adapter.planning.plan import Plan, valid_tp_sizes
from policies.errors import UserError
from policies.families.qwen2_vl import POLICY
from policies.formats import FORMATS
from policies.heads import split_heads

PLAIN = {  # round numbers, so that the expected ones below can be seen
    "name": "round", "source": "made up", "kind": "accelerator", "devices": 4, "memory_gb": 10, "memory_read_gb_s": 100,
    "matmul_tflop_s": {"bfloat16": 1}, "efficiency": {"matmul": 0.5, "attention": 0.25, "memory_read": 0.8},
    "all_reduce": [{"ranks": 2, "latency_us": 10, "bandwidth_gb_s": 1}, {"ranks": 4, "latency_us": 30,
                                                                        "bandwidth_gb_s": 3}],
    "per_layer_overhead_us": 100, "per_step_overhead_us": 50, "process_memory_gb": 1,
}
TINY = Shape(heads=2, kv_heads=1, head_dim=8, layers=2, mlp=128, vocab=256, v_heads=2, v_head_dim=4, v_layers=3)


def hardware(**changes) -> Hardware:
    return Hardware.model_validate(PLAIN | changes)


def plan_of(shape: Shape, tp_size: int, dtype: str = "bfloat16") -> Plan:
    return Plan(POLICY, POLICY.geometry(shape.config()), tp_size, dtype)


# By hand: hidden 16, 2 query heads and 1 KV head of 8, MLP 128, 2 layers; vision 8 wide, 2 heads of 4, MLP 32, 3 blocks

LOAD = Workload(prompt_tokens=10, patches=(16,), new_tokens=8, batch=3)


def test_text_of_one_rank_by_hand():
    layer = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 128 * 16  # q, k and v, o, MLP
    biases_and_norms = 16 + 2 * 8 + 2 * 16
    weights = 2 * (2 * (layer + biases_and_norms) + 16 + 256 * 16)  # final norm, head; the embedding is looked up
    assert text_work(plan_of(TINY, 1), 3, 10, 0, 0) == Work(
        layers=2, linear_flop=2 * 30 * 2 * layer + 2 * 3 * 256 * 16,  # the head sees one position of each sequence
        attention_flop=2 * 2 * 3 * 55 * 4 * 8, weight_bytes=weights)  # layers, heads, batch, 1 + ... + 10 scores
    assert text_work(plan_of(TINY, 1), 3, 1, 14, 0) == Work(
        layers=2, linear_flop=2 * 3 * (2 * layer + 256 * 16), attention_flop=2 * 2 * 3 * 15 * 4 * 8,
        weight_bytes=weights, kv_bytes=3 * 14 * (2 * 2 * 1 * 8 * 2))


def test_vision_of_one_rank_by_hand():
    patch, block, merger = 8 * 3 * 2 * 14 * 14, 3 * 8 * 8 + 8 * 8 + 2 * 8 * 32, 32 * 32 + 32 * 16
    small = 3 * (24 + 8 + 32 + 8 + 4 * 8) + 2 * 8 + 32 + 16  # biases, norms, ln_q
    assert vision_work(plan_of(TINY, 1), LOAD, 0) == Work(
        layers=3, linear_flop=2 * 48 * (patch + 3 * block) + 2 * 12 * merger, attention_flop=3 * 2 * 3 * 16**2 * 4 * 4,
        weight_bytes=2 * (patch + 3 * block + merger + small))


def test_a_rank_of_two_by_hand():
    """Half of every matrix, a query head, the one KV head twice; all-reduces of whole hidden states."""
    layer = 8 * 16 + 2 * 8 * 16 + 16 * 8 + 3 * 64 * 16
    assert text_work(plan_of(TINY, 2), 3, 10, 0, 1) == Work(
        layers=2, linear_flop=2 * 30 * 2 * layer + 2 * 3 * 128 * 16, attention_flop=2 * 1 * 3 * 55 * 4 * 8,
        weight_bytes=2 * (2 * (layer + 8 + 2 * 8 + 2 * 16) + 16 + 128 * 16),
        collectives=6, sent_bytes=5 * 30 * 16 * 2 + 0.5 * 3 * 256 * 2)  # two ranks send each byte, or half of them
    vision = vision_work(plan_of(TINY, 2), LOAD, 0)
    assert (vision.collectives, vision.sent_bytes) == (7, 2 * (6 * 48 * 8 + 12 * 16))


def test_seconds_and_memory_by_hand():
    found = predict(plan_of(TINY, 2), hardware(), LOAD)
    decode, work = found.decode, text_work(plan_of(TINY, 2), 3, 1, 14, 0)
    assert decode.work == work
    assert decode.compute_s == pytest.approx(work.linear_flop / 0.5e12 + work.attention_flop / 0.25e12)
    assert decode.read_s == pytest.approx((work.weight_bytes + work.kv_bytes) / 80e9)
    assert decode.collective_s == pytest.approx(6 * 10e-6 + (1.0 * 5 * 3 * 16 * 2 + 0.5 * 3 * 256 * 2) / 1e9)
    assert decode.overhead_s == pytest.approx(250e-6)
    assert decode.total_s == pytest.approx(max(decode.read_s, decode.compute_s) + decode.collective_s + 250e-6)
    assert found.ttft_s == pytest.approx(found.phases["vision"].total_s + found.phases["prefill"].total_s)
    assert found.decode_tok_s == pytest.approx(1 / decode.total_s)
    memory = found.memory
    assert memory.kv == 3 * 18 * (2 * 2 * 1 * 8 * 2)
    assert memory.weights == plan_of(TINY, 2).weight_bytes(memory.rank)
    outputs = 3 * 16 + 3 * 8 + 16 + 2 * 64  # norms and o_proj, q k v, down_proj, gate and up
    assert memory.activations == 30 * outputs * 2 + 3 * 16 * (3 * 2 * 14 * 14) * 4 + 3 * 256 * 2
    assert memory.total == memory.kv + memory.weights + memory.activations + 1e9


def test_images_do_not_attend_to_each_other():
    one, two = (vision_work(plan_of(TINY, 1), Workload(40, p), 0) for p in ((32,), (16, 16)))
    assert two.linear_flop == one.linear_flop and 2 * two.attention_flop == one.attention_flop


# What must hold for any model

def shapes_and_loads():
    shapes = st.builds(lambda kv_heads, group, **rest: Shape(heads=kv_heads * group, kv_heads=kv_heads, **rest),
                       st.integers(1, 4), st.integers(1, 6), layers=st.integers(1, 3), mlp=st.integers(8, 700),
                       vocab=st.integers(8, 400), tied=st.booleans(), v_heads=st.integers(1, 9))
    loads = st.builds(Workload, st.integers(1, 500), st.lists(st.integers(1, 90).map(lambda n: 4 * n), max_size=3)
                      .map(tuple), st.integers(1, 50), st.integers(1, 4))
    return shapes, loads


@st.composite
def cases(draw) -> tuple[Shape, Plan, Workload]:
    shapes, loads = shapes_and_loads()
    shape = draw(shapes)
    geometry = POLICY.geometry(shape.config())
    sizes = valid_tp_sizes(POLICY, geometry)
    assume(sizes)
    return shape, Plan(POLICY, geometry, draw(st.sampled_from(sizes)), "bfloat16"), draw(loads)


any_case = settings(deadline=None, derandomize=True, max_examples=60)


@any_case
@given(cases())
def test_flop_of_linears_are_twice_parameters_times_rows(case):
    """Over all ranks, by the shapes the tests write down on their own; KV heads that are held twice compute twice."""
    shape, plan, load = case
    matrices = {n: math.prod(d) for n, d in replace(shape, tied=False).tensors().items() if len(d) > 1}
    held = sum(s.kv[1] - s.kv[0] for s in split_heads(shape.heads, shape.kv_heads, shape.head_dim, plan.tp_size))
    extra = (held - shape.kv_heads) * shape.head_dim * shape.hidden * 2 * shape.layers
    layers, merger = (sum(v for n, v in matrices.items() if n.startswith(p)) for p in ("model.layers", "visual.merger"))
    patch = matrices["visual.patch_embed.proj.weight"] * plan.tp_size  # every rank has it whole
    blocks = sum(v for n, v in matrices.items() if n.startswith("visual.blocks"))
    tokens, patches = load.batch * load.prompt_tokens, load.batch * sum(load.patches)
    ranks = range(plan.tp_size)
    assert sum(text_work(plan, load.batch, load.prompt_tokens, 0, r).linear_flop for r in ranks) == (
        2 * tokens * (layers + extra) + 2 * load.batch * matrices["lm_head.weight"])
    assert sum(vision_work(plan, load, r).linear_flop for r in ranks) == (
        2 * patches * (patch + blocks) + 2 * (patches // 4) * merger)


@any_case
@given(cases())
def test_weights_and_collectives_are_the_plans(case):
    _, plan, load = case
    found, per_token = predict(plan, hardware(), load), plan.collectives()
    assert found.memory.weights == plan.weight_bytes(found.memory.rank)
    work = found.decode.work
    assert work.collectives == per_token["per_token"]
    sent = 2 * per_token["per_token_all_reduce_bytes"] + per_token["per_token_gathered_logits_bytes"]
    assert work.sent_bytes == pytest.approx(load.batch * sent * (plan.tp_size - 1) / plan.tp_size)


@any_case
@given(cases())
def test_limits_and_order(case):
    _, plan, load = case
    at_hand = hardware()
    found = predict(plan, at_hand, load)
    alone = predict(replace(plan, tp_size=1), at_hand, load)
    assert all(phase.collective_s == phase.work.collectives == 0 for phase in alone.phases.values())
    for rank in range(plan.tp_size):
        decode = text_work(plan, load.batch, 1, load.context, rank)
        readers = -(-plan.tp_size // 4)
        assert found.decode.total_s >= (decode.weight_bytes + decode.kv_bytes) * readers / 100e9
        prefill = text_work(plan, load.batch, load.prompt_tokens, 0, rank)
        assert found.phases["prefill"].total_s >= prefill.linear_flop / 1e12
    for more in (replace(load, prompt_tokens=load.prompt_tokens + 9), replace(load, patches=(*load.patches, 16)),
                 replace(load, batch=load.batch + 1)):
        later = predict(plan, at_hand, more)
        assert later.ttft_s >= found.ttft_s and later.memory.total > found.memory.total
        assert later.decode.total_s >= found.decode.total_s
    for change in ({"memory_read_gb_s": 200}, {"matmul_tflop_s": {"bfloat16": 2}}, {"per_layer_overhead_us": 0},
                   {"devices": 99}):
        sooner = predict(plan, hardware(**change), load)
        assert sooner.ttft_s <= found.ttft_s and sooner.decode_tok_s >= found.decode_tok_s


@pytest.mark.parametrize(("name", "tp", "most"), [("7b", 8, 4), ("7b", 3, 10), ("2b", 5, 3), ("72b", 7, 10)])
def test_the_rank_with_most_heads_sets_the_pace(name, tp, most):
    plan = plan_of(PUBLISHED[name], tp)
    found = predict(plan, hardware(), Workload(4000))  # attention matters
    assert plan.heads["text"][found.phases["prefill"].rank].owned == most
    each = [predict_rank(plan, rank) for rank in range(tp)]
    assert found.phases["prefill"].work.linear_flop + 2 * found.phases["prefill"].work.attention_flop == max(each)


def predict_rank(plan: Plan, rank: int) -> int:
    """FLOP, those of attention twice, which take twice as long on this machine."""
    work = text_work(plan, 1, 4000, 0, rank)
    return work.linear_flop + 2 * work.attention_flop


def test_bytes_are_those_of_the_format():
    """Of a quantised matrix bits / 8 and 2 / 64 bytes a weight; the head in 8 bits; biases and norms as they are."""
    shape = PUBLISHED["2b"]
    tensors = {n: math.prod(d) for n, d in shape.tensors().items() if n.startswith("model.")}
    layers = sum(size for name, size in tensors.items() if name.endswith("proj.weight"))
    head = tensors["model.embed_tokens.weight"]
    rest = sum(tensors.values()) - layers - head
    dense = predict(plan_of(shape, 1), hardware(), LOAD)
    for name, each in (("int8", 1), ("int4", 0.5)):
        found = predict(replace(plan_of(shape, 1), form=FORMATS[name]), hardware(), LOAD)
        expected = (each + 2 / 64) * layers + (1 + 2 / 64) * head + 2 * rest
        assert found.decode.work == replace(dense.decode.work, weight_bytes=expected)
        assert dense.memory.weights - found.memory.weights == 2 * sum(tensors.values()) - expected


def test_sizes_that_cut_through_a_group_are_not_in_the_table():
    shape = Shape(heads=2, kv_heads=1, head_dim=32, mlp=128)
    sizes = {form: [p.tp_size for p in predict_all(replace(plan_of(shape, 1), form=FORMATS[form]), hardware(), LOAD)]
             for form in ("dense", "int8")}
    assert sizes == {"dense": [1, 2], "int8": [1]}


def test_a_module_without_rows_is_named():
    odd = replace(POLICY, rows=tuple(entry for entry in POLICY.rows if entry[0] != "lm_head"))
    with pytest.raises(UserError, match="lm_head"):
        odd.rows_of("lm_head")
    assert {POLICY.rows_of(claim.module) for claim in POLICY.table} == {"patch", "merged", "token", "last"}


# Machines

def test_ranks_beyond_the_devices_share_them():
    accelerators, cpu = hardware(), hardware(kind="cpu", devices=2)
    assert [accelerators.devices_per_rank(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 0.5, 0.5, pytest.approx(1 / 3)]
    assert [accelerators.ranks_per_memory(n) for n in (1, 4, 5, 9)] == [1, 1, 2, 3]
    assert [cpu.devices_per_rank(n) for n in (1, 2, 4)] == [2, 1, 0.5]
    assert [cpu.ranks_per_memory(n) for n in (1, 2, 4)] == [1, 2, 4]
    said = "; ".join(cpu.sharing(4))
    assert "4 ranks on 2 cores: a rank has 0.5 of a core" in said and "1/4 of its bandwidth" in said
    assert list(accelerators.sharing(4)) == []
    four, two = (predict(plan_of(TINY, 2), hardware(kind="cpu", devices=n), LOAD) for n in (2, 1))
    assert two.decode.compute_s == pytest.approx(2 * four.decode.compute_s)
    assert two.decode.overhead_s == pytest.approx(2 * four.decode.overhead_s)
    assert two.decode.read_s == four.decode.read_s


def test_collectives_of_ranks_without_an_entry():
    """The entry of the next more ranks stands in, and the largest for all beyond it, which is said."""
    at_hand = hardware(all_reduce=PLAIN["all_reduce"][::-1])
    assert [at_hand.collective(n).ranks for n in (2, 3, 4, 7)] == [2, 4, 4, 4]
    assert "no entry for 3 ranks: that for 4 stands in" in "".join(at_hand.sharing(3))
    ring = hardware(all_reduce=[{"ranks": 4, "latency_us": 5, "bandwidth_gb_s": 2}])
    assert ring.collective_s(4, 3, 4e9) == pytest.approx(2 + 15e-6)
    assert hardware(all_reduce=[]).collective_s(1, 0, 0) == 0


def test_memory_that_does_not_fit_is_said():
    load = Workload(283, (1024,))
    on = {n: predict(plan_of(PUBLISHED["7b"], n), hardware(), load).memory for n in (1, 2, 8)}
    assert {n: m.fits for n, m in on.items()} == {1: False, 2: True, 8: True}
    assert (on[8].ranks, on[8].available) == (2, 10e9)
    shared = predict(plan_of(PUBLISHED["7b"], 2), hardware(kind="cpu"), load).memory
    assert shared.ranks == 2 and not shared.fits
