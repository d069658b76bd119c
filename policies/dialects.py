"""A family's table in the words of other tools."""

from __future__ import annotations

from policies.policy import Policy
from policies.rules import Row


def injection_policy(policy: Policy) -> dict[str, tuple[str, ...]]:
    """DeepSpeed's `injection_policy`: layer stack ("model.layers") -> the row-parallel linears inside one layer of it.

    DeepSpeed keys the same mapping by the layer's class; the adapter looks the class up in the model it runs, since
    class names differ between Transformers releases.
    """
    found: dict[str, tuple[str, ...]] = {}
    for claim in policy.table:
        if isinstance(claim.rule, Row) and ".*." in claim.module:
            stack, inner = claim.module.split(".*.", 1)
            found[stack] = (*found.get(stack, ()), inner)
    return found
