#!/usr/bin/env python3
"""Answer the requests of a config over tp_size ranks: `adapter.commands.generate` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands.generate import start

if __name__ == "__main__":
    start()
