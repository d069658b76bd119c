"""`launch/plan.py --hardware`: its options, and the prediction as plain data and as two tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapter.commands.common import whole_number
from adapter.planning.cost_model import TEXT_TOKENS, Memory, Phase, Prediction, Workload, predict, predict_all
from adapter.planning.hardware import Hardware, load_hardware
from adapter.planning.plan import Plan
from policies.errors import UserError
from policies.policy import Geometry

OPTIONS = ("--image", "--prompt-tokens", "--new-tokens", "--batch")
DEFAULT_SIDE, MOST_SIDE = 448, 2**16  # pixels


def add_options(parser: argparse.ArgumentParser) -> None:
    """--hardware and what goes with it. An option that is not given is None."""
    group = parser.add_argument_group("prediction of time and memory")
    group.add_argument("--hardware", metavar="FILE", help="predict for this machine, see configs/hardware/")
    group.add_argument("--image", action="append", type=_sides, metavar="HxW", help="height and width of an image in "
                       "pixels, as the processor leaves it; several times for several, `none` for text alone "
                       f"(default {DEFAULT_SIDE}x{DEFAULT_SIDE})")
    group.add_argument("--prompt-tokens", type=whole_number(1, 2**20), metavar="N", help="of a whole prompt, its "
                       f"images' included (default: its images' and {TEXT_TOKENS})")
    group.add_argument("--new-tokens", type=whole_number(1, 2**20), metavar="N", help="generated for each prompt "
                       "(default 32)")
    group.add_argument("--batch", type=whole_number(1, 2**16), metavar="N", help="equal prompts at once (default 1)")


def _sides(stated: str) -> tuple[int, ...]:
    """Height and width of `HxW`; nothing of `none`."""
    sides = tuple(map(int, re.findall("[0-9]+", stated))) if re.fullmatch("[0-9]{1,9}x[0-9]{1,9}", stated) else ()
    if stated != "none" and not (sides and 1 <= min(sides) <= max(sides) <= MOST_SIDE):
        raise argparse.ArgumentTypeError(f"{stated[:100]!r} is not HEIGHTxWIDTH in pixels, such as {DEFAULT_SIDE}x"
                                         f"{DEFAULT_SIDE}, or none; a side has 1 to {MOST_SIDE}")
    return sides


def forecast(plan: Plan, args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """What launch/plan.py adds, as plain data and as text; None where no hardware is asked about. Raises UserError."""
    options = dict(zip(OPTIONS, (args.image, args.prompt_tokens, args.new_tokens, args.batch), strict=True))
    if args.hardware is None:
        if stated := [option for option, value in options.items() if value is not None]:
            raise UserError(f"{', '.join(stated)} is for a prediction: give --hardware FILE too, see configs/hardware/")
        return None
    hardware, load = load_hardware(args.hardware), workload(plan.geometry, args)
    here = predict(plan, hardware, load)
    sizes = [_summary(p) for p in predict_all(plan, hardware, load)]
    notes = list(hardware.sharing(plan.tp_size))
    facts = {
        "hardware": hardware.model_dump(), "workload": vars(load), **_summary(here), "notes": notes,
        "memory": {**vars(here.memory), "total": here.memory.total, "fits": here.memory.fits},
        "phases": {name: {**vars(phase), "work": vars(phase.work), "total_s": phase.total_s}
                   for name, phase in here.phases.items()},
        "by_tp_size": sizes,
    }
    text = [f"prediction for {hardware.name}, tp_size {plan.tp_size}, {plan.dtype}: an estimate, not a measurement",
            f"  its figures: {' '.join(hardware.source.split())}", *(f"  note: {note}" for note in notes),
            *_lines(load, here), "", *_size_lines(sizes, hardware, plan.tp_size)]
    return facts, "\n".join(text)


def _size_lines(sizes: Sequence[Mapping[str, Any]], hardware: Hardware, tp_size: int) -> Iterator[str]:
    """The table of the tp sizes that the machine has devices for, and the plan's own whatever it is."""
    cards = hardware.kind == "accelerator"
    yield (f"{hardware.name} has {hardware.devices} {'cards' if cards else 'cores'}; more ranks would share them"
           + (", which `generate` refuses" if cards else ""))
    yield from _table([_size_row(size, hardware.devices if cards else tp_size) for size in sizes
                       if size["tp_size"] <= hardware.devices or size["tp_size"] == tp_size])


def workload(geometry: Geometry, args: argparse.Namespace) -> Workload:
    """From the options as given, each side of an image rounded to whole tokens, as the family's processor does. Raises
    UserError for what no prompt can be."""
    merge = geometry.merge_side
    images = [sides for sides in args.image or [(DEFAULT_SIDE, DEFAULT_SIDE)] if sides]
    in_tokens = [[max(1, round(side / (geometry.sizes["patch"] * merge))) for side in sides] for sides in images]
    tokens = sum(height * width for height, width in in_tokens)
    patches = tuple(height * width * merge**2 for height, width in in_tokens)
    load = Workload(args.prompt_tokens or tokens + TEXT_TOKENS, patches, args.new_tokens or 32, args.batch or 1)
    if load.prompt_tokens <= tokens:
        raise UserError(f"--prompt-tokens {load.prompt_tokens}: its images alone are {tokens} tokens, and text is "
                        "needed")
    if load.prompt_tokens + load.new_tokens > geometry.context:
        raise UserError(f"{load.prompt_tokens} prompt tokens ({tokens} of images) and {load.new_tokens} new ones are "
                        f"more than the model's context of {geometry.context}; use smaller images, or fewer tokens")
    return load


def _summary(p: Prediction) -> dict[str, Any]:
    return {"tp_size": p.tp_size, "ttft_s": p.ttft_s, "decode_tok_s": p.decode_tok_s,
            "ttft_collectives": sum(phase.collective_s for phase in p.first) / p.ttft_s,
            "decode_collectives": p.decode.collective_s / p.decode.total_s,
            "memory_bytes": p.memory.total, "fits": p.memory.fits}


def _lines(load: Workload, p: Prediction) -> Iterator[str]:
    images = f"images of {', '.join(map(str, load.patches))} patches" if load.patches else "no image"
    yield (f"  request: batch {load.batch}, {images}, {load.prompt_tokens} prompt tokens, {load.new_tokens} new; "
           f"{', '.join(OPTIONS)} change it; a decode step is one token at {load.context} cached ones")
    yield "  total = the longer of compute and reading + time of the collectives + overhead, on the slowest rank"
    yield from _table([_phase_row(name, phase) for name, phase in p.phases.items()])
    yield f"time to first token: {' + '.join(_ms(phase.total_s) for phase in p.first)} = {_ms(p.ttft_s)}"
    yield (f"decode: 1 / {_ms(p.decode.total_s)} = {_n(p.decode_tok_s)} tokens/s a sequence, "
           f"{_n(load.batch * p.decode_tok_s)} in all")
    yield from _memory_lines(p.memory)


def _memory_lines(m: Memory) -> Iterator[str]:
    parts = {"weights": m.weights, "KV cache": m.kv, "activations": m.activations, "process": m.process}
    terms = " + ".join(f"{name} {_gb(count)}" for name, count in parts.items())
    yield f"memory of the fullest rank ({m.rank}): {terms} = {_gb(m.total)}"
    yield (f"ranks on one memory: {m.ranks} x {_gb(m.total)} = {_gb(m.ranks * m.total)} of {_gb(m.available)}: "
           f"{'fits' if m.fits else 'DOES NOT FIT'}")


def _phase_row(name: str, phase: Phase) -> dict[str, str]:
    work = phase.work
    return {"phase": name, "rank": str(phase.rank), "GFLOP": _n((work.linear_flop + work.attention_flop) / 1e9),
            "compute": _ms(phase.compute_s), "GB read": _n((work.weight_bytes + work.kv_bytes) / 1e9),
            "reading": _ms(phase.read_s), "collectives": str(work.collectives),
            "MB sent": _n(work.sent_bytes / 1e6), "time": _ms(phase.collective_s),
            "overhead": _ms(phase.overhead_s), "total": _ms(phase.total_s)}


def _size_row(size: Mapping[str, Any], most: int) -> dict[str, str]:
    """A row of the last table; in parentheses: the part of the time that is collectives. most: ranks that can run."""
    fits = "too few cards" if size["tp_size"] > most else "yes" if size["fits"] else "no"
    return {"tp_size": str(size["tp_size"]),
            "first token (collectives)": f"{_ms(size['ttft_s'])} ({size['ttft_collectives']:.1%})",
            "tokens/s (collectives)": f"{_n(size['decode_tok_s'])} ({size['decode_collectives']:.1%})",
            "GB a rank": _n(size["memory_bytes"] / 1e9), "fits": fits}


def _table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Right-aligned columns below the rows' keys."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _n(value: float) -> str:
    """Three significant digits, as an estimate has no more, or all that are before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ms(seconds: float) -> str:
    return f"{_n(seconds * 1e3)} ms"


def _gb(count: float) -> str:
    return f"{_n(count / 1e9)} GB"
