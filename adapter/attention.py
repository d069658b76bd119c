"""Attention on a shard: the heads its modules must believe in, and a faster kernel for the vision tower's.

Releases 4.45-4.51 end attention with `view(bsz, q_len, self.hidden_size)`, others with -1; all split heads by their own
`num_heads`. Making those numbers the shard's lets every release run its own, unpatched forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from adapter import native
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


FAST = "qwenvl_tp"  # an attn_implementation by this name, for the towers beside the text tower


def use_fast_attention(model: nn.Module, plan: Plan) -> None:
    """Let the vision tower attend with adapter/csrc/attention.cpp where Transformers would with torch's sdpa, on CPU in
    bfloat16, where that takes twice the time. Where the release or the machine lacks what it takes nothing changes."""
    interface = getattr(transformers, "AttentionInterface", None)
    if interface is None or native.unavailable() or not torch.ops.qwenvl_tp.attend_all_supported():
        return
    interface.register(FAST, _attend_all)
    names = {plan.policy.published(name): name for name, _ in model.named_modules()}
    for stack in plan.geometry.layers:
        config: Any = getattr(model.get_submodule(names[stack].rpartition(".")[0]), "config", None)
        if stack != plan.geometry.text_stack and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = FAST


def _attend_all(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                scaling: float | None = None, dropout: float = 0.0, **_: Any) -> tuple[Tensor, None]:
    """In the form of Transformers' AttentionInterface: [1, H, S, D] each -> [1, S, H, D]. What the kernel does not take
    goes to sdpa."""
    assert attention_mask is None and dropout == 0.0, "a vision tower's pictures are attended one by one"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fits = query.dtype is torch.bfloat16 and query.device.type == "cpu" and query.shape[-1] <= 128
    if fits and query.shape[0] == 1 and query.shape[-1] % 2 == 0:
        return torch.ops.qwenvl_tp.attend_all(query[0], key[0], value[0], scale)[None], None
    out = scaled_dot_product_attention(query, key, value, scale=scale)
    return out.transpose(1, 2), None
