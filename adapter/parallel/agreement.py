"""The ranks of a job compare, before they share any work, what must be alike on all of them.

Hosts with another release, another checkout or another copy of the config would part ways later, in a collective of
another size or at another token, which ends in a hang, a crash of the transport or a wrong answer.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from adapter.parallel.group import Group, exchange
from policies.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers")
ROOT = Path(__file__).resolve().parents[2]
SHOWN = 60  # characters of a value in a message; of a longer one its digest


def require_alike(world: Group, facts: Mapping[str, str]) -> None:
    """Every rank must call it. Raises UserError on every rank where the facts, or the releases, are not alike on all.

    facts: name -> value, as a user knows them.
    """
    if world.size == 1:
        return
    every = exchange(world, {name: shown(value) for name, value in (_releases() | dict(facts)).items()})
    if different := differences(every):
        lines = "\n  ".join(different)
        raise UserError("the ranks of this job are not alike; give every host the same packages, the same checkout, "
                        f"the same checkpoint and the same configuration:\n  {lines}")


def _releases() -> dict[str, str]:
    """What this process has imported of PACKAGES, and its copy of this program."""
    modules = {name: sys.modules.get(name) for name in PACKAGES}
    return {name: getattr(module, "__version__", "not imported") for name, module in modules.items()} | {
        "the code of adapter and policies": _digest_of_code()}


@cache
def _digest_of_code() -> str:
    digest = hashlib.blake2b(digest_size=4)
    for package in ("adapter", "policies"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def shown(value: str) -> str:
    """A value as the ranks send it: itself or, where it is long, its digest."""
    if len(value) <= SHOWN:
        return value
    return f"digest {hashlib.blake2b(value.encode(), digest_size=4).hexdigest()}"


def differences(every: Sequence[Mapping[str, str]]) -> list[str]:
    """Each fact that differs, in words: its values, and the ranks that have them. every: the facts of each rank."""
    found = []
    for name in dict.fromkeys(name for facts in every for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(every):
            ranks.setdefault(facts.get(name, "none"), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{value} (rank {', '.join(map(str, have))})" for value, have in ranks.items())
            found.append(f"{name}: {values}")
    return found
