"""The failure this project began with, on a Transformers release that has it, and parity on that release.

QWENVL_TP_OLD_PYTHON names an interpreter whose Transformers is one of 4.45-4.51; tests/run.sh makes one, the row
`oldest` of matrix.tsv, whose DeepSpeed is the oldest that works.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import ROOT, launch
from safetensors.torch import load_file

OLD = os.environ.get("QWENVL_TP_OLD_PYTHON", "")
pytestmark = [pytest.mark.ranks, pytest.mark.long,
              pytest.mark.skipif(not OLD, reason="QWENVL_TP_OLD_PYTHON is not set")]
RESHAPE = Path(__file__).with_name("reshape_worker.py")
WORKER = Path(__file__).with_name("worker.py")
ENGINE = Path(__file__).with_name("engine_worker.py")
GEOMETRY = Shape(heads=28, kv_heads=4, head_dim=128, layers=1, mlp=512, vocab=211, v_layers=1)  # hidden 3584


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reshape") / "hidden3584", GEOMETRY, files=1)


def test_this_release_has_the_bug():
    code = ("import inspect, transformers.models.qwen2_vl.modeling_qwen2_vl as m;"
            "print('attn_output.view(bsz, q_len, self.hidden_size)' in inspect.getsource(m.Qwen2VLSdpaAttention))")
    assert subprocess.run([OLD, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


def test_the_original_message_without_the_override_and_parity_with_it(model, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    assert launch(1, RESHAPE, str(model), str(one), "--plain", python=OLD, launcher="alone").code == 0
    outcome = launch(4, RESHAPE, str(model), str(four), python=OLD)
    assert outcome.code == 0, outcome.err[-3000:]
    message = "without the override: shape '[1, 359, 3584]' is invalid for input of size 321664"
    assert outcome.err.count(message) == 4, outcome.err[-3000:]
    a, b = load_file(one)["logits"], load_file(four)["logits"]
    assert a.shape == (1, 359, 211) and a.std() > 0.3
    assert (a - b).abs().max() <= 1e-4


def test_parity_of_both_encoders_on_the_old_release(tmp_path):
    """12/2 heads over 3 ranks, from a checkpoint with newer names: text, images, video and a padded batch."""
    shape = Shape(heads=12, kv_heads=2, mlp=200, vocab=199, tied=True)
    make_checkpoint(tmp_path / "plain" / "m", shape)
    make_checkpoint(tmp_path / "newer" / "m", shape, newer_names=True)  # which this release cannot load by itself
    for n, extra, launcher, names in ((1, ["--plain"], "alone", "plain"), (3, [], "fork", "newer")):
        outcome = launch(n, WORKER, *extra, "--out", str(tmp_path), str(tmp_path / names / "m"), python=OLD,
                         launcher=launcher)
        assert outcome.code == 0, outcome.err[-3000:]
    plain, ours = load_file(tmp_path / "m.plain.safetensors"), load_file(tmp_path / "m.tp3.safetensors")
    for key, value in plain.items():
        if key.endswith(".logits"):
            assert (value - ours[key]).abs().max() <= 1e-4, key
        elif key != "sampled.tokens":
            assert torch.equal(value, ours[key]), key
    assert ours["equal_on_ranks"].all()


def test_engine_on_the_old_releases(tmp_path):
    """Two ranks, which sum through DeepSpeed's shared-memory op where there are two cores for them."""
    outcome = launch(2, ENGINE, str(make_checkpoint(tmp_path / "m")), python=OLD, timeout=400)  # spinning, if busy
    assert outcome.code == 0, outcome.err[-3000:]
    facts = next(json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"kept_call"'))
    assert facts["kept_call"] and facts["kept_call_share"] < 0.6
    assert facts["loaded_is_engine"] and facts["dtype"] == "torch.bfloat16"
    assert facts["frequencies"] == ["torch.float32"]
    assert facts["forward"] <= 1e-4
    assert facts["streamed"] and facts["long_prompt"] == [1, 1502]


def test_parity_of_the_families_that_the_old_release_has():
    """Qwen2.5-VL, which came with 4.49."""
    done = subprocess.run([OLD, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
                           "tests/parity/test_parity_of_families.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"^(\d\d) passed", done.stdout, re.MULTILINE), done.stdout[-3000:]
