#!/usr/bin/env python3
"""What an issue report needs, and what is wrong here: `adapter.doctor` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.doctor.main import start

if __name__ == "__main__":
    start()
