"""The results of `launch/verify.py` as one HTML page that needs nothing else: no script runs, nothing is loaded.

Pictures are data: URIs, the plot is inline SVG that takes the page's text colour, the raw results are embedded as JSON.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
from PIL import Image

from adapter.checkpoint.safetensors import read_config
from adapter.config.files import finite
from adapter.config.schema import Config, Processor, Request
from adapter.requests.media import MOST_PIXELS, load_image, video_of_file
from adapter.verify.plot import Layers, ResultRow, draw
from policies.errors import UserError
from policies.registry import policy_for

TEMPLATE = Path(__file__).with_name("report.html")
SIDE, FRAME_SIDE, FRAMES = 256, 128, 4  # the long side of a thumbnail; the same and how many of a video's frames
NO_FIGURES = {"id", "requests", "passed", "error", "answer", "one_process_answer"}  # of a row, which have a place


def render(config: Config, rows: Sequence[ResultRow], summary: ResultRow) -> str:
    """The page: one row a case, in the order given. Raises UserError only where matplotlib is missing."""
    rows, summary = finite(rows), finite(dict(summary))
    requests = {request.id: request for request in config.requests}
    policy = policy_for(read_config(config.model.path), "config.json")
    layers = Layers.of(rows, policy.encoder.module)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(show=_show, cell=_cell, module=_module)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        cases=[_case(row, requests) for row in rows],
        plot=draw(rows, layers) if layers.names else None,
        raw=json.dumps({"summary": summary, "rows": rows}).replace("<", r"\u003c"),  # no </script> can be in it
        summary=summary,
        where=_where_first(rows, summary, layers),
    )
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", page)  # an answer may hold any character, HTML may not
    return page.encode("utf-8", "replace").decode("utf-8")  # nor can half a surrogate pair be written to a file


def _case(row: ResultRow, requests: Mapping[str, Request]) -> dict[str, Any]:
    """A row, its requests with both answers to each, and its figures: every plain value that it has."""
    ids, ours, theirs = (_listed(row.get(key)) for key in ("requests", "answer", "one_process_answer"))
    asked = []
    for name, mine, plain in zip_longest(ids or [row.get("id")], ours, theirs):
        request = requests.get(str(name))
        asked.append({"id": name, "request": request, "ours": mine, "one_process": plain}
                     | ({"media": _media(request), "said": _said(request)} if request else {}))
    figures = {key: value for key, value in row.items() if key not in NO_FIGURES and not isinstance(value, dict | list)}
    if match := row.get("greedy_match"):
        figures["greedy_match"] = f"{match.get('equal')} of {match.get('of')}"
    return {"row": row, "asked": asked, "figures": {k: v for k, v in figures.items() if v is not None}}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _said(request: Request) -> list[tuple[str, str]]:
    return [(role, "\n".join(value for kind, value in parts if kind == "text")) for role, parts in request.turns()]


def _media(request: Request) -> list[dict[str, Any]]:
    """Its images and videos in order, each with a caption and thumbnails, or the reason why it has none."""
    shown: list[dict[str, Any]] = []
    for kind, value in (part for _, parts in request.turns() for part in parts if part[0] != "text"):
        first = value if isinstance(value, str) else value[0]
        caption = f"{kind} in a data: URL" if first.startswith("data:") else Path(first).name
        shown.append({"caption": caption, "pictures": [], "reason": None})
        try:
            shown[-1]["pictures"] = _thumbnails(kind, value)
            shown[-1]["caption"] += f", {len(value)} images as frames" if isinstance(value, tuple) else ""
        except Exception as error:  # whatever a decoder raises: the report of a long run is not lost for an image
            shown[-1]["reason"] = str(error) or type(error).__name__
    return shown


@functools.lru_cache(maxsize=256)
def _thumbnails(kind: str, value: str | tuple[str, ...]) -> list[str]:
    """Make JPEGs as data: URIs. Cached: a batch has requests that ran alone before."""
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
            for f in video_of_file(value, whole, Processor(max_frames=FRAMES), room).frames]


def _jpeg(image: Image.Image, side: int) -> str:
    image.thumbnail((side, side))
    image.save(file := io.BytesIO(), "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _where_first(rows: Sequence[ResultRow], summary: ResultRow, layers: Layers) -> str:
    """The earliest fault, in words: in the weights, else in the module nearest the inputs, else in a case."""
    weights = summary.get("reassembly") or {}
    for part in weights.get("differing") or ():
        return f"the weights: {part.get('tensor')} of rank {_show(part.get('rank'))}: {part.get('why')}"
    if weights.get("equal") is False:
        return "the weights: put together again they are not the checkpoint's"
    for _, case, module in layers.divergences(rows):
        return f"case {case}, {_module(module)}"
    for row in rows:
        if row.get("passed") is not True:
            reasons = [*_listed(row.get("error")), *_listed(row.get("problems")), "see its figures"]
            return f"case {row.get('id')}: {reasons[0]}"
    return str([*_listed(summary.get("problems")), "no case says where"][0])


def _module(found: ResultRow) -> str:
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
    """A value for a table; heads [start, stop) are shown as the first and the last of them."""
    if key.endswith("_heads") and isinstance(value, list) and len(value) == 2:
        start, stop = value
        return "none" if stop <= start else str(start) if stop == start + 1 else f"{start}–{stop - 1}"
    return _show(value)
