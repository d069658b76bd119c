"""Memory that ends on ranks of one model: smaller batches and failed rows, or one clear message and no rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, launch

WORKER = Path(__file__).with_name("out_of_memory_worker.py")
DEMO = ROOT / "launch" / "demo"
pytestmark = pytest.mark.ranks


def config(home: Path) -> str:
    """Eight requests in one batch, the sixth of which is too long to fit even alone."""
    requests = [{"id": f"r{n}", "prompt": "long " * 20 * (n == 5) + "What is it?"} for n in range(8)]
    file = home / "job.yaml"
    file.write_text(
        f"model: {{path: {DEMO / 'checkpoint'}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n"
        f"generation: {{max_new_tokens: 4, do_sample: false}}\nrequests: {json.dumps(requests)}\n")
    return str(file)


def test_ranks_that_run_out_alike_answer_what_fits(tmp_path):
    outcome = launch(2, WORKER, "alike", "--config", config(tmp_path), timeout=180)
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert outcome.code == 2, outcome.err[-3000:]
    assert [row["id"] for row in rows[:-1]] == [f"r{n}" for n in range(8)]
    assert [row["id"] for row in rows[:-1] if "error" in row] == ["r5"] and "out of memory" in rows[5]["error"]
    assert rows[-1]["answered"] == 7 and rows[-1]["failed"] == 1 and len(rows[-1]["ranks"]) == 2
    assert "8 requests at once" in outcome.err and "Traceback" not in outcome.err


def test_a_rank_that_runs_out_alone_ends_the_job_with_what_to_do(tmp_path):
    outcome = launch(2, WORKER, "alone", "--config", config(tmp_path), timeout=180)
    assert outcome.code not in (0, 70), outcome.err[-3000:]
    assert "out of memory on rank 1" in outcome.err and "lower batch_size" in outcome.err, outcome.err[-3000:]
    assert "Traceback" not in outcome.err
