#!/usr/bin/env python3
"""How fast, how large, beside whom: `adapter.bench` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.bench import start

if __name__ == "__main__":
    start()
