"""What the ranks of a group agree on before they generate: who decodes, with which operators, from which seed.

A rank that decides alone sends sums of another shape than the others, who then wait, die or add up garbage. So whatever
only one rank can know (hooks in its copy of the model, a compiler that its host lacks) is exchanged first: once as the
engine starts, and once for each `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from adapter.parallel.group import Group, exchange

MOST_WORDS = 200  # characters of a reason that is exchanged


@dataclass(frozen=True)
class Start:
    """What holds for the engine's whole life. compiled: a step's operators are those in C++, on every rank. graphs:
    every rank replays steps as graphs. refusal: why no call can be decoded by our loop; None where it can. remark: what
    the log should say of it."""

    compiled: bool
    graphs: bool
    refusal: str | None
    remark: str | None


def agree_at_start(tp: Group, no_operators: str | None, refusal: str | None, graphs: bool) -> Start:
    """no_operators: why this rank has no compiled operators. refusal: why this rank cannot use our loop at all. graphs:
    whether this rank was asked to replay graphs. Every rank must call it."""
    cards = exchange(tp, {"operators": _short(no_operators), "refusal": _short(refusal), "graphs": graphs,
                          "release": transformers.__version__})
    releases = [card["release"] for card in cards]
    refusal = _first(cards, "refusal")
    if len(set(releases)) > 1:
        refusal = f"the ranks run unlike releases of Transformers: {', '.join(releases)}"
    lacking = _first(cards, "operators")
    alike = all(card["operators"] == cards[0]["operators"] for card in cards)
    remark = None if alike else f"decoding with torch's operators on all ranks, since one has no others: {lacking}"
    return Start(lacking is None, all(card["graphs"] for card in cards), refusal, remark)


def agree_on_call(tp: Group, why_not: str | None) -> tuple[int, str | None]:
    """(rank 0's seed, the first reason that any rank has against our loop). Every rank must call it for each answer."""
    seed = int(torch.randint(2**62, (1,)))
    cards = exchange(tp, {"seed": seed, "why": _short(why_not)})
    return cards[0]["seed"], _first(cards, "why")


def _first(cards: list[dict[str, Any]], key: str) -> str | None:
    """The first rank's words; which rank that is unless all say the same."""
    words = [card[key] for card in cards]
    if len(set(words)) == 1:
        return words[0]
    return next(f"rank {rank}: {why}" for rank, why in enumerate(words) if why is not None)


def _short(words: str | None) -> str | None:
    if words is None:
        return None
    words = words.encode("ascii", "replace").decode()
    return words if len(words) <= MOST_WORDS else words[:MOST_WORDS - 3] + "..."
