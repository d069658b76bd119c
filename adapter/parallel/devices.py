"""Which accelerator each rank of a host takes. The ranks agree on it before the first collective.

A launcher either shows every rank all accelerators of its host (deepspeed, torchrun), or each rank its own
(srun --gpus-per-task=1), which that rank then sees as number 0. What ranks see is compared by the devices' UUIDs.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import Store

from adapter.parallel.launchers import Launch
from policies.errors import UserError


@dataclass(frozen=True)
class Visible:
    """What one rank sees. kind: DeepSpeed's name of the device type, "cpu" where there is no accelerator.

    devices: an identity of each visible accelerator, by this process's numbers; no two accelerators have the same one.
    """

    host: str
    local_rank: int
    kind: str
    devices: Sequence[str] = ()

    @property
    def index(self) -> int:
        """The number of the accelerator that this rank takes, among those that it sees."""
        return self.local_rank % len(self.devices)

    @property
    def taken(self) -> str:
        return self.devices[self.index]


def take_device(launch: Launch, store: Store) -> None:
    """Make this rank's accelerator the current device. Every rank must call it.

    Raises UserError on every rank where the ranks see unlike kinds of devices, or two of them would share one.
    """
    rank = launch.rank
    store.set(f"devices/{rank}", json.dumps(asdict(visible(launch.local_rank))))
    seen = [Visible(**json.loads(store.get(f"devices/{r}"))) for r in range(launch.world_size)]
    check(seen)
    if seen[rank].kind != "cpu":
        get_accelerator().set_device(seen[rank].index)


def visible(local_rank: int) -> Visible:
    """What this process sees."""
    accelerator, host = get_accelerator(), socket.gethostname()
    kind = accelerator.device_name()
    count = 0 if kind == "cpu" else accelerator.device_count()
    return Visible(host, local_rank, kind, [_identity(accelerator, host, index) for index in range(count)])


def _identity(accelerator: Any, host: str, index: int) -> str:
    """A device's UUID; where there is none, its number on its host as the variables that choose devices state it."""
    try:
        return str(getattr(torch, accelerator.device_name()).get_device_properties(index).uuid)
    except AttributeError:  # not every kind of accelerator has UUIDs in torch
        pass
    for name in accelerator.visible_devices_envs():
        stated = os.environ.get(name, "").split(",")
        if index < len(stated) and stated[index]:
            return f"{host} {stated[index].strip()}"
    return f"{host} {index}"


def check(seen: Sequence[Visible]) -> None:
    """seen: of every rank, by rank. Raises UserError where no rank can have a device of its own."""
    kinds = {v.kind for v in seen}
    if len(kinds) > 1:
        which = "; ".join(f"{kind} on rank {_ranks(r for r, v in enumerate(seen) if v.kind == kind)}"
                          for kind in sorted(kinds))
        raise UserError(f"the ranks see unlike devices: {which}. Start them on hosts with the same accelerators, or "
                        "all on CPU (DS_ACCELERATOR=cpu in the environment of every rank)")
    if kinds == {"cpu"}:
        return
    if none := [r for r, v in enumerate(seen) if not v.devices]:
        raise UserError(f"rank {_ranks(none)} sees no accelerator. Look at what its launcher shows it "
                        "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task)")
    users: dict[str, list[int]] = {}
    for r, v in enumerate(seen):
        users.setdefault(v.taken, []).append(r)
    if shared := [ranks for ranks in users.values() if len(ranks) > 1]:
        one = seen[shared[0][0]]
        which = "; ".join(f"rank {_ranks(ranks)} on host {seen[ranks[0]].host}" for ranks in shared)
        raise UserError(f"these ranks would share an accelerator: {which}. Rank {shared[0][0]} sees "
                        f"{len(one.devices)} in all. Start at most as many ranks on a host as it has accelerators, or "
                        "give each its own (srun --gpus-per-task=1)")


def _ranks(ranks: Any) -> str:
    return ", ".join(map(str, ranks))
