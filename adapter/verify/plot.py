"""The plot of the report: the errors of all cases along the layers of the model."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
    for panel, key, many, limit in ((errors, "error", statistics.median, 0), (shares, "share_of_bound", max, 1)):
        _lines(panel, [(held, [found.get(name, {}).get(key) for name in names]) for held, found in cases], many, limit)
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
    _label_layers(shares, names)
    for panel in panels:
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def _label_layers(panel: Any, names: Sequence[str]) -> None:
    """Label the layers below the plot: each one that has a word for a name, and as many numbers as fit between."""
    words = [name.rsplit(".", 1)[-1] for name in names]
    apart = math.ceil(len(names) / 40)  # so many labels at most, else they run into each other
    ticks = [at for at, word in enumerate(words) if not word.isdigit()]
    ticks += [at for at, word in enumerate(words)
              if word.isdigit() and int(word) % apart == 0 and all(abs(at - other) >= apart for other in ticks)]
    panel.set_xticks(ticks, [words[at] for at in ticks], rotation=60, ha="right", rotation_mode="anchor",
                     parse_math=False)
    panel.set_xlim(-0.6, len(names) - 0.4)


def _lines(panel: Any, cases: Sequence[tuple[bool, list[Any]]], many: Callable[..., float], limit: float) -> None:
    """Draw a light line for each case, red where it did not hold, and a heavy one for all. 0 is at the lower edge."""
    drawn = [(held, [value if isinstance(value, int | float) else math.nan for value in values])
             for held, values in cases]
    positive = [value for _, values in drawn for value in (*values, limit) if 1e-300 < value < 1e300] or [1.0]
    low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** (math.floor(math.log10(max(positive))) + 1)
    panel.set_yscale("log")
    panel.set_ylim(low / 1.3, high)  # whole decades, for two labels at least
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: "")
    labels, dot = {True: "a case", False: "a case that did not hold"}, "." if len(drawn[0][1]) <= 40 else ""
    drawn = [(held, [low / 1.3 if value < low else value for value in values]) for held, values in drawn]
    for held, values in drawn:
        panel.plot(values, f"{dot}-", markersize=3, linewidth=0.9, color=BLUE if held else RED,
                   alpha=0.45 if held else 0.8, zorder=2 if held else 4, label=labels.pop(held, None))
    columns = [[value for value in column if value == value] for column in zip(*(v for _, v in drawn), strict=True)]
    panel.plot([many(column) if column else math.nan for column in columns], f"{dot}-", markersize=8, linewidth=2.6,
               color=BLUE, zorder=3, label=f"{'largest' if many is max else 'median'} of {len(cases)} cases")
    if limit:
        panel.axhline(limit, color=RED, linestyle="--", linewidth=1.2, label="limit")
