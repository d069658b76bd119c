#!/usr/bin/env python3
"""Prove the shards against one process: `adapter.commands.verify` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands.verify import start

if __name__ == "__main__":
    start()
