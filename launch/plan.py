#!/usr/bin/env python3
"""What each rank would own, before anything is loaded: `adapter.commands.plan` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands.plan import start

if __name__ == "__main__":
    start()
