"""The records of all repeats -> the summary, and its picture (`--png`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from policies.formats import FORMATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
OURS = "ours"
NO_FIGURES = {"engine", "repeat", "case", "error"}
PANELS = (  # title, figure of an engine, the machine's limit of it
    ("Decoding, tokens/s (more is better)", "decode_tok_s", "limit_decode_tok_s"),
    ("Time to first token, s (less is better)", "ttft_s", "limit_ttft_s"),
)
NAMES = {"hf": "Transformers, one process", "hf-tp": "Transformers, its own TP", "deepspeed": "DeepSpeed, stock",
         "vllm": "vLLM", **{name: f"this project, {name}" for name in FORMATS}}
GREY, BLUE, DARK = "#c9ccd1", "#2563eb", "#8d97a5"
INCH = 0.42  # of height, for a bar


def summary(rows: Sequence[Record], repeats: int) -> dict[str, Any]:
    """The last line of the results. peers: name -> the same figures of each, or the error that ended it."""
    engines = dict.fromkeys(row["engine"] for row in rows)
    figures = {name: _figures([row for row in rows if row["engine"] == name]) for name in engines}
    return {"summary": True, "repeats": repeats, **figures.pop(OURS, {}), **({"peers": figures} if figures else {})}


def _figures(rows: Sequence[Record]) -> dict[str, Any]:
    """What one engine's rows came to. case: of the first that has one."""
    if failed := [row["error"] for row in rows if "error" in row]:
        return {"error": failed[0]}
    case: dict[str, Any] = next((row["case"] for row in rows if "case" in row), {})
    counted = [{key: value for key, value in row.items() if key not in NO_FIGURES} for row in rows]
    return {**case, **spread(counted)}


def spread(values: Sequence[Any]) -> Any:
    """{"min", "median", "max"} of numbers; of lists (a number a rank) position by position, of mappings key by key,
    keys that not every mapping has included."""
    if isinstance(values[0], Mapping):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: spread([value[key] for value in values if key in value]) for key in keys}
    if isinstance(values[0], list):
        return [spread(position) for position in zip(*values, strict=True)]
    return {"min": min(values), "median": round(median(values), 6), "max": max(values)}


def draw(found: Record, file: Path) -> None:
    """Write a PNG: bars are medians, whiskers go from the least to the most. An engine that failed has no bar."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and may want a display

    peers = {name: peer for name, peer in found.get("peers", {}).items() if "error" not in peer}
    figure = Figure(figsize=(10, 1.5 + INCH * (2 + len(peers))), layout="constrained")
    for axes, (title, name, limit) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
        bars = [("limit of the machine", GREY, found[limit]), ("this project", BLUE, found[name])]
        bars += [(NAMES[peer], BLUE if peer in FORMATS else DARK, peers[peer][name]) for peer in peers]
        _panel(axes, title, bars)
    figure.suptitle(f"{found['prompt_tokens']} prompt tokens, {found['new_tokens']} new, {found['dtype']}, "
                    f"tp_size {found['tp_size']}, {found['device']}; repeats: {found['repeats']}", fontsize=10)
    figure.savefig(file, format="png", dpi=150)


def _panel(axes: Axes, title: str, bars: list[tuple[str, str, Mapping[str, float]]]) -> None:
    """bars: (label, colour, {"min", "median", "max"}), from the top."""
    labels, colours, spreads = zip(*bars, strict=True)
    medians = [s["median"] for s in spreads]
    whiskers = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
    drawn = axes.barh(labels, medians, color=colours, height=0.62, xerr=whiskers, error_kw={"elinewidth": 1,
                                                                                            "capsize": 3})
    texts = [f"{s['median']:.4g}" + (f"  ({s['min']:.4g} to {s['max']:.4g})" if s["min"] < s["max"] else "")
             for s in spreads]
    axes.bar_label(drawn, texts, padding=7, fontsize=9)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * max(s["max"] for s in spreads))  # with room for the figures
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
