"""The three lines give the full weights back to the system: as they go, and all of them, mapped files included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import ROOT, launch

WORKER = Path(__file__).with_name("given_back_worker.py")
BIG = Shape(heads=28, kv_heads=4, head_dim=32, layers=8, mlp=2432, vocab=20000, v_layers=2, v_head_dim=20)
SLACK = 24 << 20  # modules' objects, what the allocator keeps for itself, buffers of the self-test


@pytest.mark.ranks
@pytest.mark.long
def test_full_weights_are_given_back(tmp_path):
    """float32 of a bfloat16 checkpoint is memory of the process; bfloat16 is the file, mapped by Transformers 5."""
    small = make_checkpoint(tmp_path / "small")
    big = make_checkpoint(tmp_path / "big", BIG, dtype=torch.bfloat16)
    outcome = launch(2, WORKER, str(small), str(big), launcher="deepspeed",
                     env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]})
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert {(row["rank"], row["call"]) for row in rows} == {(r, c) for r in (0, 1) for c in ("kept", "adapters")}
    for row in rows:
        print({key: value >> 20 if isinstance(value, int) and value > 9 else value for key, value in row.items()})
        private = 0 if row["mapped"] else row["whole"]  # weights in memory of the process itself
        without = row["loaded"] - private
        assert row["shard"] < 0.55 * row["whole"] > 80e6
        assert row["loaded"] - row["before"] >= 0.95 * private, "the measurement sees the weights"
        assert row["peak"] <= max(row["loaded"], without + row["shard"]) + row["largest"] + SLACK, row
        assert row["after"] <= without + 1.15 * row["shard"] + SLACK, row
        if private:
            assert row["loaded"] - row["after"] >= row["whole"] - row["shard"] - SLACK, row
        assert not row["still_mapped"], row
        assert row["malloc_as_before"], "malloc's settings are those of the user's process"
    assert not rows[0]["mapped"], "float32 is converted, and so not a file's"


def test_a_command_lets_its_own_process_keep_what_it_frees():
    """The settings cannot be read, so what sets them is watched."""
    script = ("import sys; from adapter.kernels import malloc; from adapter.commands.generate import start; "
              "malloc.keep = lambda: sys.stderr.write('kept\\n'); start()")
    ran = subprocess.run([sys.executable, "-c", script, "--config", str(ROOT / "configs" / "demo_tp4.yaml"),
                          "tensor_parallel.tp_size=1", "generation.max_new_tokens=1", "requests=[{prompt: 'What?'}]"],
                         cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0 and ran.stderr.count("kept") == 1, ran.stderr[-3000:]
