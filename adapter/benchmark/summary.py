"""The records of all repeats -> the summary: the least, the median and the most of every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Record = Mapping[str, Any]
OURS = "ours"
NO_FIGURES = {"engine", "repeat", "case", "rank", "error"}


def spread(values: Sequence[Any]) -> Any:
    """{"min", "median", "max"} of numbers; of lists (a number a rank) position by position, of mappings key by key,
    keys that not every mapping has included."""
    if isinstance(values[0], Mapping):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: spread([value[key] for value in values if key in value]) for key in keys}
    if isinstance(values[0], list):
        return [spread(position) for position in zip(*values, strict=True)]
    return {"min": min(values), "median": round(median(values), 6), "max": max(values)}


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
