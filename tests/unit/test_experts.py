"""Experts: their slices from both layouts of files, and what a token's choice makes a rank compute and read."""

from __future__ import annotations

import pytest
import torch
from families import make_family, transpose_experts
from safetensors.torch import load_file
from torch import nn

from adapter.model.layers import ParallelExperts
from adapter.parallel.group import Group
from adapter.planning.load import checked_plan, make_plan

EXPERTS = "model.language_model.layers.0.mlp.experts"
SQUARE = {"hidden_size": 80, "moe_intermediate_size": 40}  # gate and up of 2 x 40, as wide as the hidden size


@pytest.fixture(scope="module", params=[{}, SQUARE], ids=["as it is", "one of them square"])
def files(request, tmp_path_factory):
    """The same experts as Transformers writes them and as they are published."""
    written, published = (tmp_path_factory.mktemp("experts") / name for name in ("written", "published"))
    for directory in (written, published):
        torch.manual_seed(0)
        make_family(directory, "qwen3_vl_moe", **request.param)
    transpose_experts(published)
    return written, published


@pytest.mark.parametrize("by", ["tensor", "expert"])
def test_slices_are_those_of_the_whole_from_either_layout(files, by):
    whole = {name: tensor for file in files[0].glob("*.safetensors") for name, tensor in load_file(file).items()}
    for directory in files:
        plan, checkpoint = checked_plan(directory, 5, "float32", experts=by)
        for suffix in ("gate_up_proj", "down_proj"):
            for rank in range(5):
                part = plan.slice(EXPERTS, suffix, rank)
                expected = torch.cat([whole[f"{EXPERTS}.{suffix}"].narrow(part.dim, a, b - a) for a, b in part.ranges],
                                     part.dim)
                assert torch.equal(checkpoint.read(f"{EXPERTS}.{suffix}", part), expected)


def test_a_shape_of_neither_layout_is_named(files, tmp_path):
    config = (files[0] / "config.json").read_text().replace('"moe_intermediate_size": ', '"moe_intermediate_size": 1')
    (tmp_path / "config.json").write_text(config)
    for file in files[1].glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    problems = "\n".join(make_plan(tmp_path, 2, "float32")[2])
    assert f"{EXPERTS}.gate_up_proj" in problems and "config.json says [6, " in problems


def test_experts_that_no_token_chose_are_not_read():
    weights = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    for weight in weights:
        weight[[0, 2]] = torch.nan
    experts = ParallelExperts(*weights, 0, nn.SiLU(), Group(0, 1))
    chosen = torch.tensor([[1, 3], [3, 1]])
    assert experts(torch.randn(2, 8), chosen, torch.rand(2, 2)).isfinite().all()


def test_a_rank_adds_what_its_experts_give_and_nothing_where_it_has_none():
    gate_up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    hidden, chosen, shares = torch.randn(3, 8), torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.rand(3, 2)
    first, last = (ParallelExperts(gate_up[a:b], down[a:b], a, nn.SiLU(), Group(0, 1)) for a, b in ((0, 2), (2, 4)))
    whole = ParallelExperts(gate_up, down, 0, nn.SiLU(), Group(0, 1))
    assert torch.equal(first(hidden, chosen, shares), whole(hidden, chosen, shares))
    assert not last(hidden, chosen, shares).any()
