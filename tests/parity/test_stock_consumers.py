"""Each dialect run by the stock consumer it is for, over real ranks, against one process of plain Transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import deepspeed
import pytest
import torch
import transformers
from checkpoints import Shape, cases, make_checkpoint
from launching import Outcome, launch
from packaging.version import Version
from safetensors.torch import load_file
from stock_worker import CASES, TRAINED, loaded, logits, training_step

from policies.export import DIALECTS
from policies.families.qwen2_vl import POLICY, geometry
from policies.rules import Head, Replicated, expand

if Version(deepspeed.__version__) < Version("0.19.8") or Version(transformers.__version__) < Version("5.23"):
    pytest.skip("the dialects are those of DeepSpeed 0.19.8 and Transformers 5.23", allow_module_level=True)

WORKER = Path(__file__).with_name("stock_worker.py")
MODELS = {
    "heads28": Shape(heads=28, kv_heads=4),
    "heads12_tied": Shape(heads=12, kv_heads=2, mlp=202, vocab=199, tied=True),
    "heads8": Shape(heads=8, kv_heads=8, head_dim=32, mlp=202, vocab=201),
    "vision6": Shape(heads=8, kv_heads=4, head_dim=32, v_heads=6, v_head_dim=8),
}
ALL, DEEPSPEED = tuple(DIALECTS), ("injection_policy", "partition_config")
CUT_BY = {  # (tp size, model) -> the dialects that do not refuse; every run there is
    (2, "heads28"): ALL, (2, "heads12_tied"): ALL,
    (3, "heads28"): DEEPSPEED, (3, "heads8"): DEEPSPEED, (3, "heads12_tied"): (), (3, "vision6"): DEEPSPEED,
    (4, "heads28"): ALL,
}
RUNS = [(tp, model, dialect) for (tp, model), dialects in CUT_BY.items() for dialect in dialects]
every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dialects")
    for name, shape in MODELS.items():
        make_checkpoint(root / name, shape, files=1)
    return root


@cache
def started(root: Path, tp: int) -> Outcome:
    models = [str(root / model) for size, model in CUT_BY if size == tp]
    return launch(tp, WORKER, "--out", str(root), *models, timeout=600)


def job(root: Path, tp: int) -> None:
    outcome = started(root, tp)
    assert outcome.code == 0, outcome.err[-6000:]


@cache
def one_process(root: Path, model: str) -> dict[str, torch.Tensor]:
    plain, vocab = loaded(root / model), MODELS[model].vocab
    return logits(plain, vocab) | training_step(plain, POLICY, vocab, torch.Tensor.backward)


def difference(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """Largest, as a share of the largest value."""
    assert plain.isfinite().all() and ours.shape == plain.shape
    return float((ours - plain).abs().max() / plain.abs().max())


def test_cases_are_of_all_sorts():
    keys = set().union(*(cases()[name] for name in CASES))
    assert {"pixel_values", "pixel_values_videos"} <= keys and cases()["batch"]["input_ids"].shape[0] > 1


@pytest.mark.parametrize("tp", sorted({tp for tp, _ in CUT_BY}))
def test_the_dialects_that_say_it_and_no_others_were_run(workplace, tp):
    job(workplace, tp)
    done = {tuple(file.name.split(".")[:2]) for file in workplace.glob(f"*.tp{tp}.safetensors")}
    assert done == {(model, dialect) for size, model, dialect in RUNS if size == tp}


@every_run
def test_logits_equal_one_process(workplace, run):
    tp, model, dialect = run
    job(workplace, tp)
    plain, ours = one_process(workplace, model), load_file(workplace / f"{model}.{dialect}.tp{tp}.safetensors")
    for case in CASES:
        assert plain[case].std() > 0.3, "the reference itself must say something"
        largest = difference(ours[case], plain[case])
        print(f"{dialect}, tp {tp}, {model}, {case}: max |logit difference| {largest:.1e} of the largest logit")
        assert largest <= 1e-4, case


@every_run
def test_what_is_declared_cut_is_cut_and_all_else_is_whole(workplace, run):
    """Rank by rank, every parameter: a consumer that quietly replicates the model computes right logits too."""
    tp, model, dialect = run
    job(workplace, tp)
    ranks = [json.loads((workplace / f"{model}.{dialect}.tp{tp}.rank{rank}.json").read_text()) for rank in range(tp)]
    shape = geometry(MODELS[model].config())
    whole, full = DIALECTS[dialect](POLICY, shape, tp).whole, POLICY.inventory(shape)
    assert set(ranks[0]) == set(full)
    for claim in POLICY.table:
        for module in expand(claim.module, shape.layers):
            for suffix in claim.parameters():
                name, dim = f"{module}.{suffix}", claim.rule.dim if suffix == "weight" else 0
                if dialect == "injection_policy" and isinstance(claim.rule, Head):
                    dim = 1  # DeepSpeed's own doing: the head of init_inference is cut by inputs
                theirs = [list(rank[name]) for rank in ranks]
                uncut = isinstance(claim.rule, Replicated) or claim.module in whole
                if uncut or (suffix == "bias" and not claim.rule.cuts_bias):
                    assert all(shape == list(full[name]) for shape in theirs), (name, theirs)
                else:
                    assert sum(shape[dim] for shape in theirs) == full[name][dim], (name, theirs)
                    assert max(shape[dim] for shape in theirs) < full[name][dim], (name, theirs)


@pytest.mark.parametrize("run", [r for r in RUNS if r[2] == "partition_config"], ids=lambda r: f"{r[0]}-{r[1]}")
def test_a_training_step_of_partition_config_has_the_gradients_of_one_process(workplace, run):
    tp, model, dialect = run
    job(workplace, tp)
    plain, ours = one_process(workplace, model), load_file(workplace / f"{model}.{dialect}.tp{tp}.safetensors")
    for name in ("loss", *TRAINED):
        assert difference(ours[name], plain[name]) <= 1e-4, name
