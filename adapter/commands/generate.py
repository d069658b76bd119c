"""Answer the requests of a config over tp_size ranks.

    qwenvl-tp generate --config configs/demo_tp4.yaml [--ranks N] [key=value ...]
    deepspeed --num_accelerators 4 launch/generate.py --config C ...    from a checkout, or over several hosts

Ranks beyond tp_size make replicas, which share the requests. stdout: a JSON line per request, then a summary; with
`output: FILE` the lines go there, and a job that was stopped goes on where it was. Exit 0: all answered (and right,
where `expected` is given); 1: an answer differs from its `expected`; 2: bad input, a request that failed included.
"""

import argparse
from typing import NoReturn

from adapter.commands import common


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.config.load import load_config
    from adapter.planning.load import checked_plan, stated

    config = load_config(args.config, args.overrides)
    plan, _ = checked_plan(config.model.path, **stated(config))  # before slow imports
    rank, answers = common.environment_rank("RANK"), None
    if rank == 0:
        from adapter.requests.results import open_answers

        answers = open_answers(config, results.write)
    from adapter.engine import init_inference
    from adapter.health.watchdog import watching
    from adapter.kernels import malloc
    from adapter.requests.runner import answer_all, make_processor

    leads = rank % plan.tp_size == 0
    processor = make_processor(config, plan.geometry.context) if leads else None
    engine = init_inference(config)
    malloc.keep()
    with watching(engine.mpu, heartbeat_s=config.tensor_parallel.heartbeat_s):
        return answer_all(config, engine, processor, answers, results.write).exit_code


def arguments() -> argparse.ArgumentParser:
    return common.parser(__doc__)


def start() -> NoReturn:
    common.run(main, arguments())


if __name__ == "__main__":
    start()
