#!/usr/bin/env python3
"""How fast, how large, beside whom: `adapter.benchmark.main` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.benchmark.main import start

if __name__ == "__main__":
    start()
