"""`bench --png`: tokens/s and time to first token of all engines, beside what the machine allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.formats import FORMATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (  # title, figure of an engine, the machine's limit of it
    ("Decoding, tokens/s (more is better)", "decode_tok_s", "limit_decode_tok_s"),
    ("Time to first token, s (less is better)", "ttft_s", "limit_ttft_s"),
)
NAMES = {"hf": "Transformers, one process", "hf-tp": "Transformers, its own TP", "deepspeed": "DeepSpeed, stock",
         "vllm": "vLLM", **{name: f"this project, {name}" for name in FORMATS}}
LIMIT, OURS, PEER = "#c9ccd1", "#2563eb", "#8d97a5"
INCH = 0.42  # of height, for a bar


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: bars are medians, whiskers go from the least to the most. An engine that failed has no bar."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and may want a display

    peers = {name: peer for name, peer in summary.get("peers", {}).items() if "error" not in peer}
    figure = Figure(figsize=(10, 1.5 + INCH * (2 + len(peers))), layout="constrained")
    for axes, (title, name, limit) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
        bars = [("limit of the machine", LIMIT, summary[limit]), ("this project", OURS, summary[name])]
        bars += [(NAMES[peer], OURS if peer in FORMATS else PEER, peers[peer][name]) for peer in peers]
        _panel(axes, title, bars)
    figure.suptitle(f"{summary['prompt_tokens']} prompt tokens, {summary['new_tokens']} new, {summary['dtype']}, "
                    f"tp_size {summary['tp_size']}, {summary['device']}; repeats: {summary['repeats']}", fontsize=10)
    figure.savefig(file, format="png", dpi=150)


def _panel(axes: Axes, title: str, bars: list[tuple[str, str, Mapping[str, float]]]) -> None:
    """bars: (label, colour, {"min", "median", "max"}), from the top."""
    for position, (_, colour, spread) in enumerate(bars):
        low, median, high = spread["min"], spread["median"], spread["max"]
        axes.barh(position, median, color=colour, height=0.62, xerr=([median - low], [high - median]),
                  error_kw={"elinewidth": 1, "capsize": 3})
        between = f"  ({low:.4g} to {high:.4g})" if low < high else ""
        axes.annotate(f"{median:.4g}{between}", (high, position), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * max(spread["max"] for _, _, spread in bars))  # with room for the figures
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
