#!/usr/bin/env python3
"""Answer the requests of a config in one process with plain Transformers: what launch/generate.py is held against.

    python launch/one_process.py --config configs/demo_tp4.yaml [key=value ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands import common


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.config.load import load_config

    config = load_config(args.config, args.overrides)
    from adapter.requests.one_process import answer_in_one_process
    from adapter.requests.results import open_answers

    return answer_in_one_process(config, open_answers(config, results.write), results.write).exit_code


if __name__ == "__main__":
    common.run(main, common.parser(__doc__))
