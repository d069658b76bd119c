"""How fast and how large, beside what the machine allows, and beside other engines.

    qwenvl-tp bench --config C [--against hf,hf-tp,deepspeed,vllm] [key=value ...]    starts our job, and peers, in turn
    ... [--formats int8,int4]                                                         and the same job in other formats
    deepspeed --num_accelerators 2 launch/bench.py --config C ...                     these ranks measure themselves

Times the config's first request (without any: a drawn image of 448 x 448), greedily, --new tokens exactly. stdout: a
JSON line per start and repeat, then a summary: load_s, peak_rss_bytes of each rank, ttft_s, decode_tok_s, collective_us
and more, each as min, median and max of the repeats. Exit 0: measured; 1: a peer failed; 2: bad input.

Started plainly, it holds no cores itself while a job runs, and every repeat starts every job once more: the time from
the command to the first answer is measured too. Under a launcher the ranks are loaded once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapter.benchmark.driver import PEERS, check, drive
from adapter.benchmark.summary import draw, summary
from adapter.commands import common
from adapter.parallel.launchers import launcher_of
from adapter.verify.plot import require_matplotlib
from policies.errors import UserError
from policies.formats import FORMATS


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.config.load import load_config
    from adapter.planning.load import checked_plan, stated

    greedy = f"generation={{max_new_tokens: {args.new}, do_sample: false, num_beams: 1}}"
    config = load_config(args.config, [*args.overrides, greedy])
    plan, *_ = [checked_plan(config.model.path, **stated(config) | {"form": form})[0]
                for form in (config.weights.format, *args.formats)]
    rank, ranked, rows = common.environment_rank("RANK"), bool(launcher_of().mark), list[dict[str, Any]]()

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        results.write(row)

    for option, names in (("--against", args.against), ("--formats", args.formats)):
        if ranked and names:
            raise UserError(f"{option} starts jobs of its own, which need the cores that this job's ranks would hold: "
                            f"start `python launch/bench.py {option} {','.join(names)} ...`, without a launcher")
    if rank == 0:
        check(args, plan, config)
        if args.png:
            require_matplotlib()
    if ranked:
        from adapter.benchmark.ranks import measure

        code = measure(config, plan, args, write)
    else:
        code = drive(config, plan, args, write)
    if rank == 0 and code in (common.DONE, common.CHECK_FAILED) and rows:
        results.write(found := summary(rows, args.repeats))
        if args.png:
            draw(found, args.png)
        if args.write_hardware:
            from adapter.benchmark.calibrate import write_hardware

            write_hardware(plan, found, args.write_hardware)
    return code


def _new_file(stated: str) -> Path:
    """Can it be made at the end of a long run?"""
    path = Path(stated).absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{stated} cannot be written")
    return path


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(stated: str) -> list[str]:
        names = list(dict.fromkeys(stated.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is none of {', '.join(known)}")
        return names

    return parse


def start() -> NoReturn:
    arguments = common.parser(__doc__)
    arguments.add_argument("--repeats", type=common.whole_number(1, 1000), default=3, metavar="N", help="default 3")
    arguments.add_argument("--new", type=common.whole_number(2, 2**20), default=32, metavar="N",
                           help="tokens an answer, default 32")
    arguments.add_argument("--requests-at-once", type=common.whole_number(1, 4096), default=8, metavar="N",
                           help="default 8")
    arguments.add_argument("--against", type=_some_of(PEERS), default=[], metavar="PEERS",
                           help=f"time others on the same request too, of {','.join(PEERS)}")
    arguments.add_argument("--formats", type=_some_of(tuple(FORMATS)), default=[], metavar="FORMATS",
                           help=f"time one request with other weights.format too, of {','.join(FORMATS)}")
    arguments.add_argument("--vllm-python", metavar="PATH", help="interpreter of an environment with vLLM")
    arguments.add_argument("--profile", action="store_true", help="report the operators that take the most time, too")
    arguments.add_argument("--png", type=_new_file, metavar="FILE", help="draw first token and tokens/s of all")
    arguments.add_argument("--write-hardware", type=_new_file, metavar="FILE",
                           help="write this machine, as measured, for launch/plan.py --hardware")
    arguments.add_argument("--limit", type=common.whole_number(1, 10**6), default=1800, metavar="SECONDS",
                           help="that one job may take before it is ended, default 1800")
    arguments.add_argument("--inputs-into", type=Path, help=argparse.SUPPRESS)  # for the peers
    common.run(main, arguments)


if __name__ == "__main__":
    start()
