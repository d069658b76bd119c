#!/usr/bin/env python3
"""Show the answers of a tensor-parallel run beside those of one process, and what each rank held and read.

    python launch/compare.py --config C --one FILE --many FILE

Exit 0: every answer right and every token the same; 1: not; 2: a file is missing or holds no results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter.commands import common
from policies.errors import UserError

if TYPE_CHECKING:
    from adapter.config.load import Config


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.config.load import load_config

    one, many = _read(args.one), _read(args.many)
    good = True
    config = load_config(args.config)
    for request in config.requests:
        ours, plain = many.get(request.id, {}), one.get(request.id, {})
        same = ours.get("tokens") == plain.get("tokens") is not None
        right = ours.get("correct", True) and "answer" in ours
        good &= same and right
        media = ", ".join(Path(m).name for m in (*request.images, *request.videos) if isinstance(m, str))
        results.text(f"{media or 'no picture'}: {request.prompt}\n    {ours.get('answer', ours.get('error'))!r} "
                     f"{'right' if right else 'WRONG, expected ' + repr(request.expected)}; "
                     f"{'same tokens as' if same else 'TOKENS DIFFER from'} one process")
    summary = many.get("summary", {})
    stored, form, dtype = _stored(config), config.weights.format, config.model.dtype
    held = dtype if form == "dense" else f"{form} and {dtype}"
    for r in summary.get("ranks", []):
        results.text(f"rank {r['rank']}: query heads {r['q_heads'][0]}-{r['q_heads'][1] - 1}, held "
                     f"{r['weight_bytes'] / 1e6:.2f} MB of weights ({held}), read "
                     f"{r['bytes_read'] / 1e6:.2f} MB{stored}, memory {r['pss_bytes'] / 1e6:.0f} MB (PSS)")
    verdict = "all right, and the same tokens as one process" if good else "NOT all right or not the same tokens"
    results.text(f"{summary.get('answered', 0)} of {summary.get('requests', 0)} answered by {summary.get('tp_size')} "
                 f"ranks in {summary.get('seconds')} s: {verdict}")
    return common.DONE if good else common.CHECK_FAILED


def _stored(config: Config) -> str:
    """In which dtypes the checkpoint's files hold the weights, in brackets; nothing of shards."""
    from adapter.checkpoint.safetensors import TORCH_NAMES, Checkpoint
    from adapter.planning.load import make_plan, stated

    _, checkpoint, _ = make_plan(config.model.path, **stated(config))
    if not isinstance(checkpoint, Checkpoint):
        return ""
    names = {TORCH_NAMES.get(info.dtype, info.dtype) for info in checkpoint.tensors.values()}
    return f" ({', '.join(sorted(names))} files)"


def _read(file: str) -> dict[str, dict[str, Any]]:
    """Result rows by request id; the summary under "summary". Lines of launchers are not results and are left out."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    try:
        rows = [json.loads(line) for line in lines if line.startswith("{")]
    except ValueError as error:
        raise UserError(f"{file}: a line is cut: {error}") from None
    if not any(r.get("summary") for r in rows):
        raise UserError(f"{file}: holds no summary; the run that wrote it did not end well, see its messages above")
    return {"summary" if r.get("summary") else r["id"]: r for r in rows}


if __name__ == "__main__":
    arguments = common.parser(__doc__)
    arguments.add_argument("--one", required=True, metavar="FILE", help="results of launch/one_process.py")
    arguments.add_argument("--many", required=True, metavar="FILE", help="results of launch/generate.py")
    common.run(main, arguments)
