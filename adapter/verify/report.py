"""What `launch/verify.py` found, as one HTML page that needs nothing else: no script runs, nothing is loaded.

Pictures are data: URIs, the plot is inline SVG that takes the page's text colour, the raw results are embedded as JSON.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
from PIL import Image

from adapter.config.schema import Config, Processor, Request
from adapter.requests.media import MOST_PIXELS, film_of_file, load_image
from policies.errors import UserError

Row = Mapping[str, Any]
SIDE, FRAME_SIDE, FRAMES = 256, 128, 4  # the long side of a thumbnail; the same and how many of a film's frames
INK = "#010203"  # stands for the page's own text colour, which a plot drawn beforehand cannot know
BLUE, RED = "#3b82f6", "#e5484d"  # readable on white and on black
OWN_PLACE = {"id", "requests", "passed", "error", "answer", "one_process_answer"}  # what is no figure of a case


def require_matplotlib() -> None:
    """Raises UserError where the plot could not be drawn; for asking before a long run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"the report's plot needs matplotlib ({error}): pip install matplotlib") from None


def render(config: Config, rows: Sequence[Row], summary: Row) -> str:
    """The page: one row a case, in the order given. Raises UserError only where matplotlib is missing."""
    rows, summary = _plain(rows), _plain(summary)
    requests, names = {request.id: request for request in config.requests}, _layer_names(rows)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(show=_show, cell=_cell, module=_module)
    page = environment.from_string(TEMPLATE).render(
        cases=[_case(row, requests) for row in rows],
        plot=_plot(rows, names) if names else None,
        raw=json.dumps({"summary": summary, "rows": rows}).replace("<", r"\u003c"),  # no </script> can be in it
        summary=summary,
        where=_where_first(rows, summary, names),
    )
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", page)  # an answer may hold any character, HTML may not
    return page.encode("utf-8", "replace").decode("utf-8")  # nor can half a surrogate pair be written to a file


def _plain(value: Any) -> Any:
    """As JSON can hold it: what it has no word for, such as NaN, becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def _case(row: Row, requests: Mapping[str, Request]) -> dict[str, Any]:
    """A row, what each of its requests asked and was answered, and the figures: every plain value it has."""
    ids, ours, theirs = (_listed(row.get(key)) for key in ("requests", "answer", "one_process_answer"))
    asked = []
    for name, mine, plain in zip_longest(ids or [row.get("id")], ours, theirs):
        request = requests.get(str(name))
        asked.append({"id": name, "request": request, "ours": mine, "one_process": plain}
                     | ({"media": _media(request), "said": _said(request)} if request else {}))
    figures = {key: value for key, value in row.items() if key not in OWN_PLACE and not isinstance(value, dict | list)}
    if match := row.get("greedy_match"):
        figures["greedy_match"] = f"{match.get('equal')} of {match.get('of')}"
    return {"row": row, "asked": asked, "figures": {k: v for k, v in figures.items() if v is not None}}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _said(request: Request) -> list[tuple[str, str]]:
    return [(role, "\n".join(value for kind, value in parts if kind == "text")) for role, parts in request.turns()]


def _media(request: Request) -> list[dict[str, Any]]:
    """Its pictures and films in order, each with a caption and thumbnails, or the reason why there are none."""
    shown: list[dict[str, Any]] = []
    for kind, value in (part for _, parts in request.turns() for part in parts if part[0] != "text"):
        first = value if isinstance(value, str) else value[0]
        caption = f"{kind} in a data: URL" if first.startswith("data:") else Path(first).name
        shown.append({"caption": caption, "pictures": [], "reason": None})
        try:
            shown[-1]["pictures"] = _thumbnails(kind, value)
            shown[-1]["caption"] += f", {len(value)} pictures as frames" if isinstance(value, tuple) else ""
        except Exception as error:  # whatever a decoder raises: the report of a long run is not lost for a picture
            shown[-1]["reason"] = str(error) or type(error).__name__
    return shown


@functools.lru_cache(maxsize=256)
def _thumbnails(kind: str, value: str | tuple[str, ...]) -> list[str]:
    """JPEGs as data: URIs. Cached, since batches hold requests that were asked alone before."""
    if kind == "image":
        return [_jpeg(load_image(str(value)), SIDE)]
    if isinstance(value, tuple):
        count = min(len(value), FRAMES)
        at = [index * (len(value) - 1) // max(count - 1, 1) for index in range(count)]
        return [_jpeg(load_image(value[index]), FRAME_SIDE) for index in at]

    def room(_: int, height: int, width: int) -> None:
        if height * width > MOST_PIXELS:
            raise UserError(f"frames of {width} x {height} pixels are too many to show")

    whole = SimpleNamespace(temporal_patch_size=1, size={"longest_edge": math.inf})  # no frame twice, none resized
    return [_jpeg(Image.fromarray(f), FRAME_SIDE)
            for f in film_of_file(value, whole, Processor(max_frames=FRAMES), room).frames]


def _jpeg(image: Image.Image, side: int) -> str:
    image.thumbnail((side, side))
    image.save(file := io.BytesIO(), "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _layer_names(rows: Sequence[Row]) -> list[str]:
    """Every layer of every case in order of execution. A case without pictures has none of the vision encoder's."""
    names: list[str] = []
    for row in rows:
        at = 0
        for layer in row.get("layers") or ():
            if layer["name"] not in names:
                names.insert(at, layer["name"])
            at = names.index(layer["name"]) + 1
    return names


def _encoder(name: str) -> str:
    return "vision encoder" if "visual" in name.split(".") else "language model"


def _position(module: str, names: Sequence[str]) -> float:
    """Where a module stands among the layers: in one of them, or before or after all of its encoder's."""
    inside = [at for at, name in enumerate(names) if f"{module}.".startswith(f"{name}.")]
    encoder = [at for at, name in enumerate(names) if _encoder(name) == _encoder(module)]
    outside = (encoder[0] - 0.3 if "embed" in module else encoder[-1] + 0.3) if encoder else math.inf
    return inside[0] if inside else outside


def _divergences(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[float, str, Row]]:
    """(position, case, first divergent module) of every case that has one, the earliest in the model first."""
    found = [(row.get("id"), row["first_divergent_module"]) for row in rows if row.get("first_divergent_module")]
    placed = [(_position(str(module.get("module")), names), str(case), module) for case, module in found]
    return sorted(placed, key=lambda item: item[0])


def _where_first(rows: Sequence[Row], summary: Row, names: Sequence[str]) -> str:
    """The earliest thing that went wrong: in the weights, else in the module nearest the inputs, else in a case."""
    weights = summary.get("reassembly") or {}
    for part in weights.get("differing") or ():
        return f"the weights: {part.get('tensor')} of rank {_show(part.get('rank'))}: {part.get('why')}"
    if weights.get("equal") is False:
        return "the weights: put together again they are not the checkpoint's"
    for _, case, module in _divergences(rows, names):
        return f"case {case}, {_module(module)}"
    for row in rows:
        if row.get("passed") is not True:
            reasons = [*_listed(row.get("error")), *_listed(row.get("problems")), "see its figures"]
            return f"case {row.get('id')}: {reasons[0]}"
    return str([*_listed(summary.get("problems")), "no case says where"][0])


def _module(found: Row) -> str:
    return (f"{found.get('module')} ({found.get('what', 'output')}): error {_show(found.get('error'))}, "
            f"bound {_show(found.get('bound'))}, of rank {_show(found.get('ranks'))}")


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return "; ".join(f"{k}: {_show(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _cell(value: Any, key: str) -> str:
    """A value of a table; [start, stop) of heads as the first and the last of them."""
    if key.endswith("_heads") and isinstance(value, list) and len(value) == 2:
        start, stop = value
        return "none" if stop <= start else str(start) if stop == start + 1 else f"{start}–{stop - 1}"
    return _show(value)


def _plot(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The errors of all cases along the layers, as SVG to stand in the page."""
    require_matplotlib()
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.usetex": False}  # the same page from the same rows
    style |= {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata names addresses on the web
        _figure(rows, names).savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return svg[svg.index("<svg"):].replace(INK, "currentColor").replace(
        "<svg", '<svg role="img" aria-label="error along the layers"', 1)


def _figure(rows: Sequence[Row], names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and may want a display

    figure = Figure(figsize=(9.6, 6), layout="constrained")
    errors, shares = panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    cases = [(row.get("passed") is True, {layer["name"]: layer for layer in row["layers"]})
             for row in rows if row.get("layers")]
    for panel, key, many, limit in ((errors, "error", statistics.median, 0), (shares, "share_of_bound", max, 1)):
        values = [(held, [layers.get(name, {}).get(key) for name in names]) for held, layers in cases]
        _lines(panel, values, many, limit)
    errors.set_ylabel("accumulated error,\nrelative to the layer's largest output")
    shares.set_ylabel("largest local error\nas a share of its bound")
    for encoder in dict.fromkeys(map(_encoder, names)):
        at = [index for index, name in enumerate(names) if _encoder(name) == encoder]
        errors.text((at[0] + at[-1]) / 2, 1.02, encoder, transform=errors.get_xaxis_transform(), ha="center")
        for panel in panels if at[0] else ():
            panel.axvline(at[0] - 0.5, color=INK, linewidth=0.8)
    for at_layer, _, module in [item for item in _divergences(rows, names) if item[0] < math.inf][:1]:
        errors.set_title(f"first divergent module: {module.get('module')}", color=RED, pad=20, fontsize=10,
                         parse_math=False)
        for panel in panels:
            panel.axvline(at_layer, color=RED, linewidth=1.5, linestyle=":", label="first divergent")
    words = [name.rsplit(".", 1)[-1] for name in names]
    apart = math.ceil(len(names) / 40)  # so many labels at most, else they run into each other
    ticks = [at for at, word in enumerate(words) if not word.isdigit()]
    ticks += [at for at, word in enumerate(words)
              if word.isdigit() and int(word) % apart == 0 and all(abs(at - other) >= apart for other in ticks)]
    shares.set_xticks(ticks, [words[at] for at in ticks], rotation=60, ha="right", rotation_mode="anchor",
                      parse_math=False)
    shares.set_xlim(-0.6, len(names) - 0.4)
    for panel in panels:
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def _lines(panel: Any, cases: Sequence[tuple[bool, list[Any]]], many: Callable[..., float], limit: float) -> None:
    """A light line a case, red where it did not hold, and a heavy one for all. 0 stands at the lower edge."""
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


TEMPLATE = """\
{% macro table(rows) %}
{% set keys = [] %}
{% for row in rows %}{% for key in row if key not in keys %}{% set _ = keys.append(key) %}{% endfor %}{% endfor %}
<div class="wide"><table>
<tr>{% for key in keys %}<th>{{ key.replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for key in keys %}<td>{{ row.get(key) | cell(key) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro mark(row) %}
{% if row.error %}<b class="bad">not prepared</b>
{%- elif row.passed is true %}<b class="good">held</b>{% else %}<b class="bad">did not hold</b>{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ "Held" if summary.passed is true else "Did not hold" }}: {{ summary.model }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #62676f; --page: #fff; --card: #f5f6f8; --line: #d5d8dd;
  --good: #17803d; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --dim: #9aa1ab; --page: #131517; --card: #1d2023;
  --line: #3a3f45; --good: #4cc773; --bad: #ff7b7f; } }
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --page: #fff; --card: #fff; --line: #bbb;
  --good: #17803d; --bad: #c62a2f; } article, figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } .plot svg { min-width: 0 !important; } h2, h3 { break-after: avoid; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
.verdict, article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1rem;
  margin: 1rem 0; }
.verdict { border-left: .5rem solid var(--bad); } .verdict.held { border-left-color: var(--good); }
h1, h3 { margin: .2rem 0; } .good { color: var(--good); } .bad { color: var(--bad); } .dim { color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { overflow-wrap: break-word; text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0;
  border-bottom: 1px solid var(--line); }
figure { margin: .5rem 0; } .plot svg { width: 100%; min-width: 40rem; height: auto; }
.plot text { font-family: inherit !important; } .pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
.pictures img { border: 1px solid var(--line); } figcaption { font-size: 12px; color: var(--dim); }
ul { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; list-style: none; padding: 0; font-size: 13px; }
.said, .answers p { white-space: pre-wrap; margin: .3rem 0; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.answers div { border-top: 2px solid var(--line); } .answers.differ div { border-top-color: var(--bad); }
</style>
</head>
<body>
<header class="verdict {{ 'held' if summary.passed is true }}">
{% if summary.passed is true %}<h1 class="good">Held</h1>
{% else %}<h1 class="bad">Did not hold</h1>
<p>First at {{ where }}</p>
{% endif %}
<p>{{ summary.tp_size | show }} ranks against one process on the same weights: {{ cases | length }} cases, of which
{{ cases | selectattr("row.passed", "true") | list | length }} held.
{{ summary.model }}, {{ summary.dtype | show }}.</p>
{% for problem in summary.problems or [] %}<p class="bad">{{ problem | show }}</p>
{% endfor %}
</header>
<h2>Cases</h2>
<div class="wide"><table>
<tr><th>case</th><th></th><th>greedy tokens equal</th><th>largest logit difference</th><th>largest share of bound</th>
<th>first divergent module</th></tr>
{% for case in cases %}
<tr><td><a href="#case-{{ loop.index }}">{{ case.row.id }}</a></td><td>{{ mark(case.row) }}</td>
<td>{{ case.figures.greedy_match | d(none) | show }}</td><td>{{ case.row.max_abs_logit_diff | d(none) | show }}</td>
<td>{{ case.row.largest_share_of_bound | d(none) | show }}</td>
<td>{{ (case.row.first_divergent_module or {}).module | d(none) | show }}</td></tr>
{% endfor %}
</table></div>
<h2>Error along the layers</h2>
{% if plot %}<figure class="plot"><div class="wide">{{ plot | safe }}</div>
<figcaption>Above: the largest difference from a freely running one-process model after each layer, as a part of that
layer's largest output. Below: of the modules inside a layer, the one nearest the limit of rounding error derived for
it, both given the same inputs. A difference of 0 stands at the lower edge.</figcaption></figure>
{% else %}<p>No layer was compared.</p>
{% endif %}
{% if summary.bound %}<p class="dim">{{ summary.bound | show }}</p>
{% endif %}
<h2>Weights put together again</h2>
{% set weights = summary.reassembly or {} %}
{% if weights %}<p>{{ weights.tensors | d(none) | show }} tensors, {{ weights.bytes | d(none) | show }} bytes:
{% if weights.equal is true %}<b class="good">equal to the checkpoint's</b>
{%- else %}<b class="bad">not the checkpoint's</b>{% endif %}</p>
{% if weights.differing %}{{ table(weights.differing) }}{% endif %}
{% else %}<p>Not compared.</p>
{% endif %}
<h2>The ranks' shares</h2>
{% if summary.ranks %}{{ table(summary.ranks) }}
{% else %}<p>Not stated.</p>
{% endif %}
{% for case in cases %}
{% set row = case.row %}
<article id="case-{{ loop.index }}">
<h3>{{ row.id }} {{ mark(row) }}</h3>
{% for problem in ([row.error] if row.error else []) + (row.problems or []) %}<p class="bad">{{ problem | show }}</p>
{% endfor %}
{% if row.first_divergent_module %}<p class="bad">First divergent module: {{ row.first_divergent_module | module }}</p>
{% endif %}
{% for asked in case.asked %}
{% if case.asked | length > 1 %}<h4>{{ asked.id | show }}</h4>
{% endif %}
<div class="pictures">
{% for item in asked.media %}
<figure>{% for uri in item.pictures %}<img src="{{ uri }}" alt="{{ item.caption }}"> {% endfor %}
<figcaption>{{ item.caption }}{% if item.reason %}: <span class="bad">{{ item.reason }}</span>{% endif %}
</figcaption></figure>
{% endfor %}
</div>
{% for role, text in asked.said %}
<p class="said">{% if asked.said | length > 1 %}<span class="dim">{{ role }}:</span> {% endif %}{{ text }}</p>
{% endfor %}
{% if not row.error %}
<div class="answers{{ ' differ' if asked.ours != asked.one_process }}">
<div><span class="dim">{{ summary.tp_size | show }} ranks</span><p>{{ asked.ours | show }}</p></div>
<div><span class="dim">one process{{ ", another answer" if asked.ours != asked.one_process }}</span>
<p>{{ asked.one_process | show }}</p></div>
</div>
{% if asked.request.expected %}<p class="dim">expected: {{ asked.request.expected }}</p>
{% endif %}
{% endif %}
{% endfor %}
<ul>
{% for key, value in case.figures.items() %}
<li><span class="dim">{{ key.replace("_", " ") }}</span> {{ value | show }}</li>
{% endfor %}
</ul>
{% if row.parted %}<p>Where greedy decoding parted:</p>{{ table(row.parted) }}{% endif %}
</article>
{% endfor %}
<footer class="dim">
{% for key in ("all_reduce", "seconds", "versions") if summary[key] is defined %}
<p>{{ key.replace("_", " ") }}: {{ summary[key] | show }}</p>
{% endfor %}
</footer>
<script type="application/json" id="results">{{ raw | safe }}</script>
</body>
</html>
"""
