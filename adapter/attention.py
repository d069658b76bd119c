"""The per-rank head override: what Transformers' attention modules must believe about themselves on a shard.

Releases 4.45-4.51 end attention with `view(bsz, q_len, self.hidden_size)`, others with -1; all split heads by their own
`num_heads`. Making those numbers the shard's lets every release run its own, unpatched forward.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from adapter.plan import Plan
from policies.heads import HeadShard
from policies.rules import expand


def override_heads(modules: Mapping[str, nn.Module], plan: Plan, heads: Mapping[str, HeadShard]) -> None:
    """Set the numbers of each attention of the towers in `heads` to those given, this rank's. `modules` maps published
    names to modules.

    An attribute a release does not have is left out; an attention module that is not there is a bug in the policy.
    `replaced` is DeepSpeed's own mark on modules whose numbers are already true, which keeps it from dividing them.
    """
    for row in plan.policy.head_numbers:
        for name in expand(row.module, plan.geometry.layers) if row.tower in heads else ():
            shard = heads[row.tower]
            module = modules[name]
            known = [attribute for attribute in row.numbers if hasattr(module, attribute)]
            assert known, f"{name}: none of {list(row.numbers)}; this Transformers release calls its heads otherwise"
            for attribute in known:
                setattr(module, attribute, getattr(shard, row.numbers[attribute]))
            module.replaced = True  # type: ignore[assignment]
