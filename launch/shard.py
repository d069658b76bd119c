#!/usr/bin/env python3
"""Write a model's shards once, a file per rank: `adapter.commands.shard` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands.shard import start

if __name__ == "__main__":
    start()
