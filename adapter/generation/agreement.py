"""What the ranks of a group agree on before they generate: who decodes, with which operators, from which seed.

A rank that decides alone sends sums of another shape than the others, who then wait, die or add up garbage. So whatever
only one rank can know (hooks in its copy of the model, a compiler that its host lacks) is exchanged first: once as the
engine starts, and once for each `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adapter.parallel.group import Group, exchange

MOST_CHARACTERS = 200  # of a reason that is exchanged


@dataclass(frozen=True)
class Start:
    """This is what holds for the engine's whole life.

    compiled: a step's operators are those in C++, on every rank. graphs: every rank replays steps as graphs. refusal:
    why no call can be decoded by our loop; None where it can. remark: what the log should say of it.
    """

    compiled: bool
    graphs: bool
    refusal: str | None
    remark: str | None


def agree_at_start(tp: Group, no_operators: str | None, refusal: str | None, graphs: bool) -> Start:
    """Every rank tells the others what it can do, and all take what every one can. Every rank must call it.

    no_operators: why this rank has no compiled operators. refusal: why this rank cannot use our loop at all. graphs:
    whether this rank was asked to replay graphs.
    """
    cards = exchange(tp, {"operators": _short(no_operators), "refusal": _short(refusal), "graphs": graphs})
    lacking = _first(cards, "operators")
    alike = all(card["operators"] == cards[0]["operators"] for card in cards)
    remark = None if alike else f"decoding with torch's operators on all ranks, since one has no others: {lacking}"
    return Start(lacking is None, all(card["graphs"] for card in cards), _first(cards, "refusal"), remark)


def agree_on_call(tp: Group, why_not: str | None) -> tuple[int, str | None]:
    """Return rank 0's seed and the first reason that any rank has against our loop. Every rank must call it for each
    answer."""
    seed = int(torch.randint(2**62, (1,)))
    cards = exchange(tp, {"seed": seed, "why": _short(why_not)})
    return cards[0]["seed"], _first(cards, "why")


def _first(cards: list[dict[str, Any]], key: str) -> str | None:
    """Return the first reason that a rank gives, with the number of that rank unless all give the same one."""
    reasons = [card[key] for card in cards]
    if len(set(reasons)) == 1:
        return reasons[0]
    return next(f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None)


def _short(reason: str | None) -> str | None:
    """Return a reason as it is exchanged: in ASCII, at most MOST_CHARACTERS long."""
    if reason is None:
        return None
    reason = reason.encode("ascii", "replace").decode()
    return reason if len(reason) <= MOST_CHARACTERS else reason[:MOST_CHARACTERS - 3] + "..."
