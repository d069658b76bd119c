"""Attention on a shard: the heads its modules must believe in, and a faster kernel.

Releases 4.45-4.51 end attention with `view(bsz, q_len, self.hidden_size)`, others with -1; all split heads by their own
`num_heads`. Making those numbers the shard's lets every release run its own, unpatched forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adapter.kernels import build
from adapter.kernels.attention import accepts, attention_interface
from adapter.model.published import PublishedModules
from adapter.planning.plan import Plan
from policies.heads import HeadShard


def override_heads(modules: Mapping[str, nn.Module], plan: Plan, heads: Mapping[str, HeadShard]) -> None:
    """Set the numbers of each attention of the encoders in `heads` to those given, this rank's. `modules` maps
    published names to modules.

    An attribute a release does not have is left out; an attention module that is not there is a bug in the policy.
    `replaced` is DeepSpeed's own mark on modules whose numbers are already true, which keeps it from dividing them.
    """
    for row in plan.policy.head_numbers:
        for name in plan.policy.modules(row, plan.geometry) if row.encoder in heads else ():
            shard = heads[row.encoder]
            module = modules[name]
            known = [attribute for attribute in row.numbers if hasattr(module, attribute)]
            assert known, f"{name}: none of {list(row.numbers)}; this Transformers release calls its heads otherwise"
            for attribute in known:
                setattr(module, attribute, _number(row.numbers[attribute], shard, plan))
            module.replaced = True  # type: ignore[assignment]


def _number(what: str | tuple[str, ...], shard: HeadShard, plan: Plan) -> int:
    """A field of the shard, or how many elements of some axes its heads have (policies.rules.HeadNumbers)."""
    if isinstance(what, str):
        return int(getattr(shard, what))
    return sum(shard.owned * plan.policy.rows_of_a_head(axis, plan.geometry) for axis in what)


IMPLEMENTATION = "qwenvl_tp"  # the name of this project's attn_implementation in Transformers


class CpuAttention:
    """Attention by adapter/kernels/csrc/attention.cpp, for a model whose release of Transformers attends by interface.

    It is for CPUs: bfloat16 attention that would go to torch's sdpa, which takes longer there. Where the release or the
    processor lacks what it needs, `apply` changes nothing.
    """

    def __init__(self, modules: PublishedModules, plan: Plan) -> None:
        self.modules, self.plan = modules, plan

    def apply(self) -> None:
        """Set the implementation of both stacks, and let the vision attention rotate in place."""
        if not self._register():
            return
        for stack in self.plan.geometry.layers:
            config: Any = getattr(self._owner(stack), "config", None)
            can = self._has_masks() or stack != self.plan.geometry.text_stack
            if can and getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = IMPLEMENTATION
        heads = self.plan.policy.encoder.heads
        rows = [row for row in self.plan.policy.head_numbers if row.encoder == heads]
        names = [name for row in rows for name in self.plan.policy.modules(row, self.plan.geometry)]
        for attention in map(self.modules.__getitem__, names):
            if hasattr(attention, "scaling"):  # a release whose attention goes by the interface
                attention.__class__ = _rotating(type(attention))  # type: ignore[arg-type]  # a class can be hashed

    def _owner(self, stack: str) -> nn.Module:
        """The module that a stack of layers belongs to, whose config names its attention."""
        return self.modules.model.get_submodule(self.modules.names[stack].rpartition(".")[0])

    @staticmethod
    def _has_masks() -> bool:
        """Whether the release makes masks by the attention's name: without, a padded prompt would have none."""
        return hasattr(transformers, "AttentionMaskInterface")

    def _register(self) -> bool:
        """Make the implementation known to Transformers; False where it cannot run."""
        interface = getattr(transformers, "AttentionInterface", None)
        if interface is None or build.unavailable() or not torch.ops.qwenvl_tp.attend_all_supported():
            return False
        interface.register(IMPLEMENTATION, attention_interface)
        if self._has_masks():
            masks = transformers.AttentionMaskInterface
            masks.register(IMPLEMENTATION, masks()["sdpa"])
        return True


class _Rotating:
    """A vision encoder's attention that rotates queries and keys where they are, in one pass, as Transformers' does in
    a dozen; in half precision on CPU where the kernel below attends. Everything else is the release's own forward."""

    def forward(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any,
                position_embeddings: tuple[Tensor, Tensor] | None = None, **more: Any) -> Tensor:
        given = position_embeddings is not None and not args and not self.training
        if not (given and self.config._attn_implementation == IMPLEMENTATION and accepts(hidden_states, self.head_dim)):
            own: Tensor = super().forward(  # type: ignore[misc]
                hidden_states, cu_seqlens, *args, position_embeddings=position_embeddings, **more)
            return own
        assert position_embeddings is not None
        heads = self.qkv(hidden_states).view(len(hidden_states), 3 * self.num_heads, self.head_dim)
        cos, sin = (t.float().contiguous() for t in position_embeddings)
        torch.ops.qwenvl_tp.rotate(heads[:, :2 * self.num_heads], cos, sin)
        out = [torch.ops.qwenvl_tp.attend_all(*heads[a:b].transpose(0, 1).chunk(3), self.scaling, False)
               for a, b in pairwise(cu_seqlens.tolist())]
        joined = out[0] if len(out) == 1 else torch.cat(out)
        result: Tensor = self.proj(joined.flatten(1))
        return result


@cache
def _rotating(attention: type) -> type:
    """Of the same name, so that whoever prints the model sees what it is."""
    return type(attention.__name__, (_Rotating, attention), {})
