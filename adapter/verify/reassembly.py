"""Do the shards, put together again, equal the checkpoint, bit for bit? Answered by hashes; nobody gathers the model.

Every rank hashes what it holds in memory. The file's own bytes of the same slice are hashed by the next rank, which
reads them through safetensors, so that no rank vouches for itself and no code is on both sides (quantised weights are
hashed as codes and scales: that both sides have the same quantiser is why the logits are held against the checkpoint).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from adapter.checkpoint.digest import digest
from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import Shards, read_held, sha256
from adapter.kernels.linear import Quantised, Weight, make_weight
from adapter.model.published import PublishedModules
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.verify.reference import read_tensor, stored_name
from policies.rules import Replicated


@dataclass(frozen=True)
class Reassembly:
    """tensors and bytes that were compared over all ranks; differing: {tensor, rank, why} of each that is not equal."""

    tensors: int
    bytes: int
    differing: tuple[Mapping[str, Any], ...]

    def row(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "bytes": self.bytes, "equal": not self.differing,
                "differing": list(self.differing)}


def reassembly(model: nn.Module, plan: Plan, tp: Group, checkpoint: Checkpoint | Shards,
               dtype: torch.dtype) -> Reassembly:
    """Every rank must call it; the same answer on every rank. Of shards whole files are hashed as well."""
    modules = PublishedModules(model, plan.policy)
    names = [(module, suffix) for module, claim in plan.claims.items() for suffix in claim.parameters()]
    next_rank = (tp.rank + 1) % tp.size
    held, stored = [], []
    for module, suffix in names:
        held.append(_digest(modules.parameter(module, suffix)))
        stored.append(_digest(_stored(checkpoint, plan, module, suffix, next_rank, dtype)))
    mine = torch.tensor([*held, *stored], device=get_accelerator().current_device_name())
    every = tp.all_gather_last(mine, (len(mine),) * tp.size)
    have, want = every.view(tp.size, 2, -1).cpu().unbind(1)
    differing = [
        {"tensor": f"{m}.{s}", "rank": r, "why": f"this rank's part is not that of {checkpoint.directory}"}
        for r in range(tp.size) for i, (m, s) in enumerate(names) if have[r, i] != want[r - 1, i]
    ] + _gaps(plan)
    if isinstance(checkpoint, Shards):
        differing += _altered(checkpoint, tp, next_rank)
    return Reassembly(len(names), sum(plan.weight_bytes(r) for r in range(tp.size)), tuple(differing))


def _stored(checkpoint: Checkpoint | Shards, plan: Plan, module: str, suffix: str, rank: int,
            dtype: torch.dtype) -> Weight:
    """What the files say that `rank` must hold of a parameter."""
    name = stored_name(plan, f"{module}.{suffix}")
    if isinstance(checkpoint, Shards):
        return read_held(checkpoint, rank, name)
    tensor = read_tensor(checkpoint, name, plan.slice(module, suffix, rank)).to(dtype)
    return make_weight(tensor, plan.format_of(module)) if suffix == "weight" else tensor


def _altered(shards: Shards, tp: Group, rank: int) -> list[dict[str, Any]]:
    """Files that are not what was written, by the manifest's digests; this rank hashes that of `rank`."""
    assert shards.manifest is not None
    same = sha256(shards.file(rank)) == shards.manifest.files[rank].sha256
    flags = torch.tensor([same], dtype=torch.uint8, device=get_accelerator().current_device_name())
    every = tp.all_gather_last(flags, (1,) * tp.size).tolist()
    return [{"tensor": shards.file(r).name, "rank": r, "why": "the file is not the one that was written: its "
             "SHA-256 is another than shards.json says"} for r in range(tp.size) if not every[r - 1]]


def _digest(tensor: Weight | None) -> int:
    if isinstance(tensor, Quantised):
        return digest([tensor.codes, tensor.scales])
    return 0 if tensor is None else digest(tensor)  # 0: the parameter is not there


def _gaps(plan: Plan) -> list[dict[str, Any]]:
    """Elements that no rank owns, or that several own though nothing declares them replicated."""
    found = []
    for module, claim in plan.claims.items():
        for suffix in claim.parameters():
            parts = [plan.slice(module, suffix, r) for r in range(plan.tp_size)]
            if isinstance(claim.rule, Replicated) or parts[0].dim is None:
                continue
            owners = torch.zeros(parts[0].shape[parts[0].dim], dtype=torch.int32)
            for part in parts:
                for start, stop in part.ranges:
                    owners[start:stop] += 1
            shared = any(plan.policy.head_axes.get(axis, ("", ""))[1] == "kv" for axis in claim.axes())
            if bool((owners == 0).any()) or (bool((owners > 1).any()) and not shared):
                at = int(((owners != 1) if not shared else owners == 0).nonzero()[0])
                found.append({"tensor": f"{module}.{suffix}", "rank": None,
                              "why": f"element {at} of dimension {parts[0].dim} has {int(owners[at])} owners"})
    return found
