"""`launch/plan.py --hardware`: its options, and the prediction as plain data and as two tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from adapter.planning.cost_model import TEXT_TOKENS, Phase, Prediction, Workload, predict, predict_all
from adapter.planning.hardware import Hardware, load_hardware
from adapter.planning.plan import Plan
from policies.errors import UserError
from policies.policy import Geometry

DEFAULT_IMAGE = "448x448"
MOST = {"--prompt-tokens": 2**20, "--new-tokens": 2**20, "--batch": 2**16}
MOST_SIDE = 2**16  # pixels
PHASES = ("phase", "rank", "GFLOP", "compute", "GB read", "reading", "collectives", "MB", "time", "overhead", "total")
SIZES = ("tp_size", "first token", "collectives", "tokens/s", "collectives", "GB a rank", "fits")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--hardware and what goes with it. An option that is not given is None."""
    group = parser.add_argument_group("prediction of time and memory")
    group.add_argument("--hardware", metavar="FILE", help="predict for this machine, see configs/hardware/")
    group.add_argument("--image", action="append", metavar="HxW", help="height and width of an image in pixels, as the "
                       "processor leaves it; several times for several, `none` for text alone "
                       f"(default {DEFAULT_IMAGE})")
    group.add_argument("--prompt-tokens", type=int, metavar="N", help="of a whole prompt, its images' included "
                       f"(default: its images' and {TEXT_TOKENS})")
    group.add_argument("--new-tokens", type=int, metavar="N", help="generated for each prompt (default 32)")
    group.add_argument("--batch", type=int, metavar="N", help="equal prompts at once (default 1)")


def forecast(plan: Plan, args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """What launch/plan.py adds, as plain data and as text; None where no hardware is asked about. Raises UserError."""
    stated = [o for o in ("--image", *MOST) if getattr(args, o[2:].replace("-", "_")) is not None]
    if args.hardware is None:
        if stated:
            raise UserError(f"{', '.join(stated)} is for a prediction: give --hardware FILE too, see configs/hardware/")
        return None
    hardware = load_hardware(args.hardware)
    load = workload(plan.geometry, args.image or [DEFAULT_IMAGE], args.prompt_tokens, args.new_tokens, args.batch)
    here, by_size = predict(plan, hardware, load), predict_all(plan, hardware, load)
    facts = {
        "hardware": hardware.model_dump(exclude_none=True), "workload": vars(load), **_summary(here),
        "notes": list(hardware.sharing(plan.tp_size)),
        "memory": {**vars(here.memory), "total": here.memory.total, "fits": here.memory.fits},
        "phases": {name: _phase_facts(p) for name, p in _phases(here)},
        "by_tp_size": [_summary(p) for p in by_size],
    }
    return facts, "\n".join([*_lines(plan, hardware, load, here), "", *_columns(SIZES, [_row(p) for p in by_size])])


def workload(geometry: Geometry, images: list[str], prompt_tokens: int | None, new_tokens: int | None,
             batch: int | None) -> Workload:
    """From the options as given. Raises UserError for what no prompt can be."""
    for option, value in zip(MOST, (prompt_tokens, new_tokens, batch), strict=True):
        if value is not None and not 1 <= value <= MOST[option]:
            raise UserError(f"{option} {value}: from 1 to {MOST[option]} is possible")
    patches = () if images == ["none"] else tuple(_patches(geometry, image) for image in images)
    tokens = sum(patches) // geometry.merge_side ** 2
    load = Workload(prompt_tokens or tokens + TEXT_TOKENS, patches, new_tokens or 32, batch or 1)
    if load.prompt_tokens <= tokens:
        raise UserError(f"--prompt-tokens {prompt_tokens}: its images alone are {tokens} tokens, and text is needed")
    if load.prompt_tokens + load.new_tokens > geometry.context:
        raise UserError(f"{load.prompt_tokens} prompt tokens ({tokens} of images) and {load.new_tokens} new ones are "
                        f"more than the model's context of {geometry.context}; use smaller images, or fewer tokens")
    return load


def _patches(geometry: Geometry, image: str) -> int:
    """Patches of one image, each side rounded to whole tokens, as the family's processor does."""
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", image)
    if not sides or not all(1 <= int(side) <= MOST_SIDE for side in sides.groups()):
        raise UserError(f"--image {image[:100]!r}: HEIGHTxWIDTH in pixels is needed, such as {DEFAULT_IMAGE}, or none; "
                        f"a side has 1 to {MOST_SIDE}")
    merge = geometry.merge_side
    height, width = (merge * max(1, round(int(side) / (geometry.sizes["patch"] * merge))) for side in sides.groups())
    return height * width


def _phases(p: Prediction) -> Iterator[tuple[str, Phase]]:
    if p.vision is not None:
        yield "vision", p.vision
    yield from (("prefill", p.prefill), ("decode", p.decode))


def _phase_facts(phase: Phase) -> dict[str, Any]:
    seconds = {key: value for key, value in vars(phase).items() if key.endswith("_s")}
    return {"slowest_rank": phase.rank, **vars(phase.work), **seconds, "total_s": phase.total_s}


def _summary(p: Prediction) -> dict[str, Any]:
    return {"tp_size": p.tp_size, "ttft_s": p.ttft_s, "decode_tok_s": p.decode_tok_s,
            "ttft_collectives": p.ttft_collectives, "decode_collectives": p.decode_collectives,
            "memory_bytes": p.memory.total, "fits": p.memory.fits}


def _lines(plan: Plan, hardware: Hardware, load: Workload, p: Prediction) -> Iterator[str]:
    yield f"prediction for {hardware.name}, tp_size {p.tp_size}, {plan.dtype}: an estimate, not a measurement"
    yield f"  its figures: {' '.join(hardware.source.split())}"
    yield from (f"  note: {note}" for note in hardware.sharing(p.tp_size))
    images = f"images of {', '.join(map(str, load.patches))} patches" if load.patches else "no image"
    yield (f"  workload: batch {load.batch}, {images}, {load.prompt_tokens} prompt tokens, {load.new_tokens} new; a "
           f"decode step is one token at {load.context} cached ones")
    yield "  total = the longer of compute and reading + time of the collectives + overhead, on the slowest rank"
    yield from _columns(PHASES, [_phase_row(name, phase) for name, phase in _phases(p)])
    sums = " + ".join(_time(phase.total_s) for phase in p.first)
    yield f"time to first token: {sums} = {_time(p.ttft_s)}, {p.ttft_collectives:.1%} of it in collectives"
    total = f", all {load.batch} sequences {_n(load.batch * p.decode_tok_s)}" if load.batch > 1 else ""
    yield (f"decode: 1 / {_time(p.decode.total_s)} = {_n(p.decode_tok_s)} tokens/s a sequence{total}, "
           f"{p.decode_collectives:.1%} of it in collectives")
    m = p.memory
    yield (f"memory of the fullest rank ({m.rank}): weights {_gb(m.weights)} + KV cache {_gb(m.kv)} + activations "
           f"{_gb(m.activations)} + process {_gb(m.process)} = {_gb(m.total)}")
    yield (f"ranks on one memory: {m.ranks} x {_gb(m.total)} = {_gb(m.ranks * m.total)} of {_gb(m.available)}: "
           f"{'fits' if m.fits else 'DOES NOT FIT'}")


def _phase_row(name: str, phase: Phase) -> tuple[str, ...]:
    work = phase.work
    return (name, str(phase.rank), _n((work.linear_flop + work.attention_flop) / 1e9), _time(phase.compute_s),
            _n((work.weight_bytes + work.kv_bytes) / 1e9), _time(phase.read_s), str(work.reduces + work.gathers),
            _n((work.reduced_bytes + work.gathered_bytes) / 1e6), _time(phase.collective_s), _time(phase.overhead_s),
            _time(phase.total_s))


def _row(p: Prediction) -> tuple[str, ...]:
    return (str(p.tp_size), _time(p.ttft_s), f"{p.ttft_collectives:.1%}", _n(p.decode_tok_s),
            f"{p.decode_collectives:.1%}", f"{p.memory.total / 1e9:.3f}", "yes" if p.memory.fits else "no")


def _columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _n(value: float) -> str:
    """Five significant digits, in the plain notation of a pocket calculator where that is short."""
    return f"{value:.5g}" if value < 1e5 else f"{value:.0f}"


def _time(seconds: float) -> str:
    return f"{_n(seconds)} s" if seconds >= 1 else f"{_n(seconds * 1e3)} ms"


def _gb(count: float) -> str:
    return f"{_n(count / 1e9)} GB"
