"""Prove the shards: the requests of a config over tp_size ranks against one process on the same checkpoint.

    qwenvl-tp verify --config C [--dtype bfloat16] [--report FILE.html] [key=value ...]
    deepspeed --num_accelerators 4 launch/verify.py --config C ...    from a checkout, or over several hosts

Runs in float32 unless --dtype says otherwise, shards (adapter.commands.shard) in the config's model.dtype. stdout: a
JSON line per request (and one for a padded batch), then a summary. Exit 0: everything held; 1: something did not,
named in `problems`; 2: bad input, a failed request included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapter.commands import common
from policies.errors import BAD_INPUT, CHECK_FAILED, DONE, UserError

if TYPE_CHECKING:
    from adapter.checkpoint.safetensors import Checkpoint
    from adapter.config.schema import Config
    from adapter.planning.plan import Plan


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.planning.load import checked_plan, stated

    config = _config(args)
    plan, checkpoint = checked_plan(config.model.path, **stated(config))
    original = _original(config, plan)
    first = common.environment_rank("RANK") == 0
    if args.report and first:
        _check_report(Path(args.report))
    from adapter.engine import init_inference
    from adapter.health.watchdog import watching
    from adapter.kernels import malloc
    from adapter.parallel.launchers import read_environment
    from adapter.requests.runner import make_processor
    from adapter.verify.verifier import Verifier

    if (ranks := read_environment().world_size) > plan.tp_size:
        raise UserError(f"verify proves one replica, over tp_size {plan.tp_size} ranks, and this job has {ranks}; "
                        f"start `deepspeed --num_accelerators {plan.tp_size} ...`")
    processor = make_processor(config, plan.geometry.context) if first else None
    engine = init_inference(config)
    malloc.keep()
    tp, rows = engine.mpu.tp, list[dict[str, Any]]()

    def write(row: dict[str, Any]) -> None:
        results.write(row)
        rows.append(row)

    with watching(engine.mpu, heartbeat_s=config.tensor_parallel.heartbeat_s):
        passed = Verifier(config, engine, tp, checkpoint, processor, write, original).run()
        code = _finish(config, rows, args.report) if first else DONE
        code = tp.agreed(code)  # nobody leaves before the report is written
    return code or (DONE if passed else CHECK_FAILED)


def _config(args: argparse.Namespace) -> Config:
    """The config in the dtype to verify in: --dtype, an override of model.dtype, that of shards, else float32."""
    from adapter.checkpoint.sharded import is_sharded
    from adapter.config.load import load_config

    overrides = [*args.overrides, *([f"model.dtype={args.dtype}"] if args.dtype else [])]
    config = load_config(args.config, overrides)
    if any(o.startswith("model.dtype=") for o in overrides) or is_sharded(config.model.path):
        return config
    if config.model.attn_implementation == "flash_attention_2":
        raise UserError("model.attn_implementation = flash_attention_2 computes in half precision only: verify it with "
                        "--dtype bfloat16, or in float32 with model.attn_implementation=sdpa")
    return load_config(args.config, [*overrides, "model.dtype=float32"])


def _finish(config: Config, rows: list[dict[str, Any]], report: str | None) -> int:
    """Write the report of a run's rows, the summary last, where one is wanted, and return what failed requests mean.

    The verdict goes to stderr in one line.
    """
    print(f"verify: {'everything held' if rows[-1]['passed'] else 'NOT everything held'}, {len(rows) - 1} cases",
          file=sys.stderr)
    if report:
        from adapter.verify.report import render

        Path(report).write_text(render(config, rows[:-1], rows[-1]), encoding="utf-8")
        print(f"report: {report}", file=sys.stderr)
    return BAD_INPUT if any("error" in row for row in rows) else DONE


def _original(config: Config, plan: Plan) -> Checkpoint | None:
    """The model that shards were made from, where the config names it. Raises UserError where it is another one."""
    from adapter.checkpoint.safetensors import Checkpoint
    from adapter.planning.load import checked_plan, stated

    if (directory := config.weights.original) is None:
        return None
    whole, checkpoint = checked_plan(directory, **stated(config))
    if not isinstance(checkpoint, Checkpoint):
        raise UserError(f"weights.original = {directory}: holds shards; the model that they were made from is needed")
    if whole.geometry != plan.geometry:
        raise UserError(f"weights.original = {directory}: its config.json describes another model than that of "
                        f"{config.model.path}")
    return checkpoint


def _check_report(file: Path) -> None:
    """Before a long run: can the report be written at its end? Raises UserError."""
    from adapter.verify.plot import require_matplotlib

    require_matplotlib()
    try:
        file.open("a").close()
    except OSError as error:
        raise UserError(f"--report {file}: cannot be written: {error.strerror}") from None


def arguments() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of weights and activations over the ranks, as model.dtype; one process: float32")
    parser.add_argument("--report", metavar="FILE", help="write an HTML report as well")
    return parser


def start() -> NoReturn:
    common.run(main, arguments())


if __name__ == "__main__":
    start()
