"""launch/verify.py on shards: memory against files, files against the manifest, and both against the original where the
config names it; what cannot be known without it is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import Shape, make_checkpoint
from launching import ROOT, launch

from adapter.checkpoint.sharded import file_name, open_shards
from adapter.commands.shard import write_shards
from adapter.kernels import linear as kernels
from adapter.planning.load import checked_plan

DEMO = ROOT / "launch" / "demo"
REQUEST = f"requests=[{{prompt: What colour, images: [{next((DEMO / 'pictures').glob('*.png'))}]}}]"
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id",
          "pad_token_id", "bos_token_id")
pytestmark = pytest.mark.ranks


def run(directory: Path, *overrides: str):
    (directory / "c.yaml").write_text("{model: {path: shards, dtype: float32}, tensor_parallel: {tp_size: 2}}")
    outcome = launch(2, ROOT / "launch" / "verify.py", "--config", str(directory / "c.yaml"), REQUEST,
                     "generation.max_new_tokens=4", *overrides)
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert rows, outcome.err[-4000:]
    return outcome, rows[0], rows[-1]


def shards_of(model: Path, directory: Path, form: str = "dense", vision: str = "tensor") -> Path:
    write_shards(*checked_plan(model, 2, "float32", vision, form), directory / "shards")
    return directory


@pytest.mark.parametrize("vision", [pytest.param("tensor", marks=pytest.mark.sweep), "data"])
def test_sound_shards_hold_against_themselves(tmp_path, vision):
    outcome, row, summary = run(shards_of(DEMO / "checkpoint", tmp_path, vision=vision),
                                f"tensor_parallel.vision={vision}")
    assert outcome.code == 0 and row["passed"] and row["max_abs_logit_diff"] <= 1e-4, outcome.err[-4000:]
    assert summary["shards"]["equal"] and summary["shards"]["tensors"] == 94
    assert summary["not_checked"] == ["whether the shards are slices of that model"]
    assert "set weights.original" in outcome.err


def test_a_byte_that_changed_is_found_and_with_the_original_the_tensor(tmp_path):
    directory = shards_of(DEMO / "checkpoint", tmp_path) / "shards"
    plan = checked_plan(directory, 2, "float32")[0]
    name = "model.layers.1.mlp.up_proj.weight"
    info = open_shards(directory, plan).files[1][name]
    with open(directory / file_name(1, 2), "r+b") as file:
        file.seek(info.offset + 402)
        file.write(b"\x81")
    outcome, _, summary = run(tmp_path)
    reported = f"{file_name(1, 2)} on rank 1: the file is not the one that was written"
    assert outcome.code == 1 and any(p.startswith(reported) for p in summary["problems"]), summary["problems"]
    assert not any(name in problem for problem in summary["problems"]), "its memory is that of its file"
    outcome, _, summary = run(tmp_path, f"weights.original={DEMO / 'checkpoint'}")
    assert outcome.code == 1 and summary["not_checked"] == [], outcome.err[-4000:]
    assert [d["tensor"] for d in summary["reassembly"]["differing"]] == [name]
    assert summary["reassembly"]["differing"][0]["rank"] == 1
    assert [d["tensor"] for d in summary["shards"]["differing"]] == [file_name(1, 2)]


def test_another_original_is_refused(tmp_path):
    other = make_checkpoint(tmp_path / "other", Shape())
    outcome = launch(2, ROOT / "launch" / "verify.py", "--config", _config(shards_of(DEMO / "checkpoint", tmp_path)),
                     f"weights.original={other}")
    assert outcome.code == 2 and "describes another model" in outcome.err, outcome.err[-4000:]


def _config(directory: Path) -> str:
    (directory / "c.yaml").write_text("{model: {path: shards, dtype: float32}, tensor_parallel: {tp_size: 2}}")
    return str(directory / "c.yaml")


@pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}")
def test_quantised_shards(tmp_path):
    """Without the original the one process has what the codes stand for; with it, the original's weights."""
    demo = json.loads((DEMO / "checkpoint" / "config.json").read_text())
    shape = Shape(heads=4, kv_heads=2, head_dim=64, mlp=256, vocab=demo["vocab_size"], layers=1, v_layers=1)
    model = make_checkpoint(tmp_path / "model", shape)
    config = json.loads((model / "config.json").read_text()) | {t: demo[t] for t in TOKENS if t in demo}
    (model / "config.json").write_text(json.dumps(config))
    for file in (DEMO / "checkpoint").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, model)
    shards_of(model, tmp_path, "int4")
    costs = []
    for original in ([], [f"weights.original={model}"]):
        outcome, row, summary = run(tmp_path, "weights.format=int4", *original)
        assert outcome.code == 0 and row["passed"] and summary["format"] == "int4", outcome.err[-4000:]
        assert summary["shards"]["equal"] and summary["reassembly"]["equal"]
        costs.append(row["max_abs_logit_diff"])
        assert [w.split(":")[0] for w in summary["not_checked"]] == [
            "whether the shards are slices of that model", "what int4 costs"] * (not original)
    assert 0 < costs[0] < costs[1], "only the original shows what the codes cost"
