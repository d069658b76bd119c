"""The table of docs/models.md can be made."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import ROOT


@pytest.mark.long
@pytest.mark.ranks
def test_a_family_s_rows_are_made():
    done = subprocess.run([sys.executable, "tests/models_table.py", "--tp", "2", "--family", "qwen3_vl"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `qwen3_vl` | 4.57 |")]
    assert len(rows) == 6 and all("| equal | our loop |" in row for row in rows), done.stdout
