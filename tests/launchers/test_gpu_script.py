"""tests/gpu.sh on a machine without a card: the same jobs on CPU ranks, so that it cannot rot."""

import os
import subprocess
import sys

import pytest
from launching import ROOT


@pytest.mark.ranks
@pytest.mark.long
def test_the_jobs_for_cards_run_on_cpu_ranks():
    done = subprocess.run(["bash", "tests/gpu.sh", "2"], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable},
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for job in ("parity in float32, tp 2", "replicas", "graphs against no graphs", "a killed rank",
                "bench against Transformers"):
        assert f"| {job} | 2 | passed |" in done.stdout, done.stdout
    assert "| flash_attention_2 | 2 | FAILED |" not in done.stdout
