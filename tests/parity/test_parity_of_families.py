"""fp32 parity with one process for the families beside Qwen2-VL: tp sizes that divide and that do not, both encoders.

One job per tp_size runs every model and case (worker.py); the reference is plain Transformers.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from families import CLASSES, make_family, transpose_experts
from launching import launch
from safetensors.torch import load_file

from adapter.commands.shard import write_shards
from adapter.planning.load import checked_plan

WORKER = Path(__file__).with_name("worker.py")
ALL = {  # name -> (family, changes of its text_config)
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl_many_kv": ("qwen3_vl", {"num_key_value_heads": 4, "vocab_size": 199}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
    "qwen3_5": ("qwen3_5", {}),
}
MODELS = {name: made for name, made in ALL.items() if hasattr(transformers, f"{CLASSES[made[0]]}Config")}  # as released
FAMILIES = sorted({family for family, _ in MODELS.values()})
UNDECODED = {"qwen3_5"}  # models whose steps are Transformers' own
CASES = ("text", "image", "two_images", "video", "batch")
SIZES = [1, pytest.param(2, marks=pytest.mark.sweep), 3, pytest.param(4, marks=pytest.mark.sweep),
         pytest.param(5, marks=pytest.mark.sweep), pytest.param(8, marks=pytest.mark.sweep)]
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    models = [str(make_family(root / name, family, **changes)) for name, (family, changes) in MODELS.items()]
    outcome = launch(1, WORKER, "--plain", "--out", str(root), *models, launcher="alone")
    assert outcome.code == 0, outcome.err[-3000:]
    return root


@cache
def job(root: Path, tp: int) -> None:
    launcher = "fork" if tp > 1 else "alone"
    for names in (MODELS.keys() - UNDECODED, MODELS.keys() & UNDECODED):
        if not names:  # an older release
            continue
        outcome = launch(tp, WORKER, "--out", str(root), *(str(root / name) for name in sorted(names)),
                         launcher=launcher)
        assert outcome.code == 0, outcome.err[-6000:]
        assert ("Transformers' own loop" in outcome.err) == (names <= UNDECODED), outcome.err[-3000:]
        reason = "a step of qwen3_5 is another one: its linear layers keep a state"
        assert (reason in outcome.err) == (names <= UNDECODED)


@pytest.fixture(params=SIZES, scope="session")
def tp(request, workplace) -> int:
    job(workplace, request.param)
    return request.param


@pytest.fixture(params=MODELS)
def pair(request, workplace, tp) -> tuple[dict, dict]:
    """(reference, ours) of one model at one tp_size."""
    return (load_file(workplace / f"{request.param}.plain.safetensors"),
            load_file(workplace / f"{request.param}.tp{tp}.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_one_process(pair, tp, case):
    plain, ours = pair
    largest = float(plain[f"{case}.logits"].abs().max())
    assert plain[f"{case}.logits"].std() > 0.3, "the reference itself must say something"
    difference = float((plain[f"{case}.logits"] - ours[f"{case}.logits"]).abs().max())
    print(f"tp {tp}, {case}: max |logit difference| {difference:.1e} of {largest:.1f}")
    assert difference <= 1e-4 * largest
    assert torch.equal(plain[f"{case}.tokens"], ours[f"{case}.tokens"])


def test_beams_and_positional_inputs_equal_one_process(pair):
    plain, ours = pair
    assert torch.equal(plain["beams.tokens"], ours["beams.tokens"])
    assert torch.equal(plain["positional.tokens"], ours["positional.tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_on_disk_give_the_same_bits(workplace, tmp_path, family):
    """Written before, three ranks' files, and then read alone."""
    job(workplace, 3)
    write_shards(*checked_plan(workplace / family, 3, "float32"), tmp_path / family)
    outcome = launch(3, WORKER, "--out", str(tmp_path), str(tmp_path / family))
    assert outcome.code == 0, outcome.err[-3000:]
    before, ours = (load_file(where / f"{family}.tp3.safetensors") for where in (workplace, tmp_path))
    assert all(torch.equal(before[key], ours[key]) for key in before if key != "bytes")  # read from files


def test_three_lines_shard_a_model_that_a_script_loaded(workplace, tmp_path):
    outcome = launch(2, WORKER, "--loaded", "--only", "video", "--out", str(tmp_path),
                     *(str(workplace / family) for family in FAMILIES))
    assert outcome.code == 0, outcome.err[-6000:]
    for family in FAMILIES:
        plain, ours = (load_file(file) for file in (workplace / f"{family}.plain.safetensors",
                                                    tmp_path / f"{family}.loaded.safetensors"))
        largest = float(plain["video.logits"].abs().max())
        assert (plain["video.logits"] - ours["video.logits"]).abs().max() <= 1e-4 * largest
        assert torch.equal(plain["video.tokens"], ours["video.tokens"])


@pytest.mark.skipif("qwen3_vl_moe" not in FAMILIES, reason="a release without it")
@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.sweep)])
def test_whole_experts_dealt_to_ranks_from_published_files(workplace, tmp_path, tp):
    """tensor_parallel.experts: expert; 6 experts over 4 ranks are 2, 1, 2, 1. Published files have their matrices the
    other way round."""
    shutil.copytree(workplace / "qwen3_vl_moe", tmp_path / "qwen3_vl_moe")
    transpose_experts(tmp_path / "qwen3_vl_moe")
    outcome = launch(tp, WORKER, "--experts", "expert", "--out", str(tmp_path), str(tmp_path / "qwen3_vl_moe"))
    assert outcome.code == 0, outcome.err[-6000:]
    plain, ours = load_file(workplace / "qwen3_vl_moe.plain.safetensors"), load_file(
        tmp_path / f"qwen3_vl_moe.tp{tp}.safetensors")
    for case in CASES:
        assert torch.allclose(plain[f"{case}.logits"], ours[f"{case}.logits"], rtol=0, atol=1e-4)
        assert torch.equal(plain[f"{case}.tokens"], ours[f"{case}.tokens"])


def test_every_rank_has_the_same_bits_and_draws(pair):
    assert pair[1]["equal_on_ranks"].all()
