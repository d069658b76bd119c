"""The formats weights are held in, as data: bits, bytes, and which matrices of a model take which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from policies.rules import Claim, Column, Head, Row, Vocab

GROUP = 64  # weights along a matrix's inputs that share a float16 scale; shards are cut on its multiples


@dataclass(frozen=True)
class Format:
    """`bits` of a code; 0: the weight as it is, in the model's dtype."""

    name: str
    bits: int = 0

    def bytes(self, rows: int, inputs: int) -> int:
        """Of a quantised matrix [rows, inputs]: its codes and scales."""
        groups = -(-inputs // GROUP)
        return rows * groups * (GROUP * self.bits // 8 + 2)


DENSE, INT8, INT4 = Format("dense"), Format("int8", 8), Format("int4", 4)
FORMATS: Mapping[str, Format] = {f.name: f for f in (DENSE, INT8, INT4)}


def format_of(claim: Claim, wanted: Format, text_stack: str) -> Format:
    """What a module's weight is held in where the config wants `wanted`: the text encoder's linear layers take it, the
    vocabulary 8 bits, since an error in a logit is seen at once; everything else stays as it is."""
    if not wanted.bits:
        return DENSE
    if isinstance(claim.rule, Vocab | Head):
        return INT8
    return wanted if isinstance(claim.rule, Column | Row) and claim.module.startswith(f"{text_stack}.") else DENSE
