"""The plot of the report: the errors of all cases along the layers of the model."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.errors import UserError

ResultRow = Mapping[str, Any]
INK = "#010203"  # stands for the page's own text colour, which a plot drawn beforehand cannot know
BLUE, RED = "#3b82f6", "#e5484d"  # readable on white and on black


def require_matplotlib() -> None:
    """Raises UserError where the plot could not be drawn; for asking before a long run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"the report's plot needs matplotlib ({error}): pip install matplotlib") from None


@dataclass(frozen=True)
class Layers:
    """Every layer of every case in order of execution. encoder: the published name of the vision encoder."""

    names: tuple[str, ...]
    encoder: str

    @classmethod
    def of(cls, rows: Sequence[ResultRow], encoder: str) -> Layers:
        """The layers of these cases. A case without images has none of the vision encoder's."""
        names: list[str] = []
        for row in rows:
            at = 0
            for layer in row.get("layers") or ():
                if layer["name"] not in names:
                    names.insert(at, layer["name"])
                at = names.index(layer["name"]) + 1
        return cls(tuple(names), encoder)

    def stack(self, name: str) -> str:
        """The part of the model that a module belongs to, in words."""
        return "vision encoder" if f".{self.encoder}." in f".{name}." else "language model"

    def position(self, module: str) -> float:
        """Where a module stands among the layers: in one of them, or before or after all of its stack's.

        Infinity where no layer of its stack was compared.
        """
        for at, name in enumerate(self.names):
            if f"{module}.".startswith(f"{name}."):
                return at
        stack = [at for at, name in enumerate(self.names) if self.stack(name) == self.stack(module)]
        if not stack:
            return math.inf
        return stack[0] - 0.3 if "embed" in module else stack[-1] + 0.3

    def divergences(self, rows: Sequence[ResultRow]) -> list[tuple[float, str, ResultRow]]:
        """(position, case, first divergent module) of every case that has one, the earliest in the model first."""
        found = [(row.get("id"), row["first_divergent_module"]) for row in rows if row.get("first_divergent_module")]
        placed = [(self.position(str(module.get("module"))), str(case), module) for case, module in found]
        return sorted(placed, key=lambda item: item[0])


def draw(rows: Sequence[ResultRow], layers: Layers) -> str:
    """Draw the errors of all cases along the layers, as SVG to stand in the page."""
    require_matplotlib()
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.usetex": False}  # the same page from the same rows
    style |= {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata names addresses on the web
        figure_of(rows, layers).savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return svg[svg.index("<svg"):].replace(INK, "currentColor").replace(
        "<svg", '<svg role="img" aria-label="error along the layers"', 1)


def figure_of(rows: Sequence[ResultRow], layers: Layers) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and may want a display

    names = layers.names
    figure = Figure(figsize=(9.6, 6), layout="constrained")
    errors, shares = panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    cases = [(row.get("passed") is True, {layer["name"]: layer for layer in row["layers"]})
             for row in rows if row.get("layers")]
    for panel, key, many in ((errors, "error", "median"), (shares, "share_of_bound", "largest")):
        _lines(panel, [(held, [_drawn(found.get(name, {}).get(key)) for name in names]) for held, found in cases], many)
    shares.axhline(1, color=RED, linestyle="--", linewidth=1.2, label="limit")
    errors.set_ylabel("accumulated error,\nrelative to the layer's largest output")
    shares.set_ylabel("largest local error\nas a share of its bound")
    for stack in dict.fromkeys(map(layers.stack, names)):
        at = [index for index, name in enumerate(names) if layers.stack(name) == stack]
        errors.text((at[0] + at[-1]) / 2, 1.02, stack, transform=errors.get_xaxis_transform(), ha="center")
        for panel in panels if at[0] else ():
            panel.axvline(at[0] - 0.5, color=INK, linewidth=0.8)
    for at_layer, _, module in [item for item in layers.divergences(rows) if item[0] < math.inf][:1]:
        errors.set_title(f"first divergent module: {module.get('module')}", color=RED, pad=20, fontsize=10,
                         parse_math=False)
        for panel in panels:
            panel.axvline(at_layer, color=RED, linewidth=1.5, linestyle=":", label="first divergent")
    ticks = range(0, len(names), math.ceil(len(names) / 40))  # so many labels at most, else they run into each other
    shares.set_xticks(ticks, [names[at].rsplit(".", 1)[-1] for at in ticks], rotation=60, ha="right",
                      rotation_mode="anchor", parse_math=False)
    for panel in panels:
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def _drawn(value: Any) -> float:
    """A figure as a logarithm has a place for it: 0 is below the lower edge, what is no finite number is a gap."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return 0.0 if value < 1e-30 else min(value, 1e30)


def _lines(panel: Any, cases: Sequence[tuple[bool, list[float]]], many: str) -> None:
    """Draw a light line for each case, red where it did not hold, and a heavy one for all: their median or largest."""
    labels, dot = {True: "a case", False: "a case that did not hold"}, "." if len(cases[0][1]) <= 40 else ""
    for held, values in cases:
        panel.plot(values, f"{dot}-", markersize=3, linewidth=0.9, color=BLUE if held else RED,
                   alpha=0.45 if held else 0.8, zorder=2 if held else 4, label=labels.pop(held, None))
    columns = [[value for value in column if value == value] for column in zip(*(v for _, v in cases), strict=True)]
    of_all = statistics.median if many == "median" else max
    panel.plot([of_all(column) if column else math.nan for column in columns], f"{dot}-", markersize=8, linewidth=2.6,
               color=BLUE, zorder=3, label=f"{many} of {len(cases)} cases")
    limit = [1.0] if many == "largest" else []
    positive = [value for _, values in cases for value in (*values, *limit) if value > 0] or [1.0]
    panel.set_ylim(min(positive) / 3.2, max(positive) * 3.2)  # a decade at least, for a label
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
