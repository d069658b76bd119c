"""The demo: the quick start as a newcomer runs it, and right answers in bfloat16 with beams."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT, launch

CONFIG = str(ROOT / "configs" / "demo_tp4.yaml")
pytestmark = pytest.mark.ranks


def rows(outcome) -> dict[str, dict]:
    found = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert found and found[-1]["summary"], outcome.err[-3000:]
    return {row.get("id", "summary"): row for row in found}


def test_quickstart():
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(ROOT / "launch" / "quickstart.sh")], capture_output=True, text=True, env=env,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("right; same tokens as one process") == 12
    assert "rank 3: query heads 21-27, held 3.48 MB of weights (float32), read 1.74 MB (bfloat16 files)" in done.stdout
    assert "12 of 12 answered by 4 ranks" in done.stdout


def test_right_answers_in_bfloat16_with_beams():
    outcome = launch(3, ROOT / "launch" / "generate.py", "--config", CONFIG, "tensor_parallel.tp_size=3",
                     "model.dtype=bfloat16", "generation={max_new_tokens: 8, num_beams: 2}", "batch_size=5")
    assert outcome.code == 0, outcome.err[-3000:]
    assert rows(outcome)["summary"]["wrong"] == 0
