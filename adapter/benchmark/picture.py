"""The summary as a picture: tokens/s and time to first token of all engines, beside what the machine allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.formats import FORMATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spread = Mapping[str, float]
PANELS = (  # title, figure of an engine, the machine's limit of it
    ("Decoding, tokens/s (more is better)", "decode_tok_s", "limit_decode_tok_s"),
    ("Time to first token, s (less is better)", "ttft_s", "limit_ttft_s"),
)
NAMES = {"hf": "Transformers, one process", "hf-tp": "Transformers, its own TP", "deepspeed": "DeepSpeed, stock",
         "vllm": "vLLM", **{name: f"this project, {name}" for name in FORMATS}}
LIMIT, OURS, PEER, INK = "#c9ccd1", "#2563eb", "#8d97a5", "#1f2328"
INCH = 0.42  # of height, for a bar


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: bars are medians, whiskers go from the least to the most. An engine that failed has no bar."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and may want a display

    style = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        peers = sum("error" not in peer for peer in summary.get("peers", {}).values())
        figure = Figure(figsize=(10, 1.5 + INCH * (2 + peers)), layout="constrained")
        for axes, (title, name, limit) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
            _panel(axes, title, _bars(summary, name, limit))
        what = (f"{summary['prompt_tokens']} prompt tokens, {summary['new_tokens']} new, {summary['dtype']}, "
                f"tp_size {summary['tp_size']}, {summary['device']}; repeats: {summary['repeats']}")
        figure.suptitle(what, fontsize=10)
        figure.savefig(file, format="png", dpi=150)


def _bars(summary: Mapping[str, Any], name: str, limit: str) -> list[tuple[str, str, Spread]]:
    """(label, colour, figure), from the top."""
    peers = [(NAMES[peer], OURS if peer in FORMATS else PEER, found[name])
             for peer, found in summary.get("peers", {}).items() if "error" not in found]
    return [("limit of the machine", LIMIT, summary[limit]), ("this project", OURS, summary[name]), *peers]


def _panel(axes: Axes, title: str, bars: Sequence[tuple[str, str, Spread]]) -> None:
    labels, colours, spreads = zip(*bars, strict=True)
    places, medians = range(len(bars)), [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["min"] for spread in spreads]
    above = [spread["max"] - spread["median"] for spread in spreads]
    axes.barh(places, medians, color=colours, height=0.62, xerr=(below, above),
              error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3})
    for place, spread in zip(places, spreads, strict=True):
        axes.annotate(_text(spread), (spread["max"], place), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, labels)
    axes.set_ylim(len(bars) - 0.5, -0.5)  # from the top; both panels have the same bars
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, 1.5 * max(spread["max"] for spread in spreads))  # with room for the figures
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def _text(spread: Spread) -> str:
    """The median, and from where to where the repeats went."""
    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    apart = f"  ({short(spread['min'])} to {short(spread['max'])})" if spread["min"] < spread["max"] else ""
    return short(spread["median"]) + apart
