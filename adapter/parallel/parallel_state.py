"""Ranks and groups: from any launcher's environment to a process group and the tp x dp grid, as a Megatron `mpu`.

Nothing here is global but the process group torch itself keeps: groups travel as values (`Group`, `Mpu`).
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group

from adapter.parallel.agreement import require_alike
from adapter.parallel.all_reduce import TOKEN_BYTES, choose
from adapter.parallel.group import Group
from adapter.parallel.launchers import Launch, read_environment
from adapter.parallel.progress import Progress
from adapter.parallel.rendezvous import (
    TIMEOUT,
    check_world,
    init_process_group,
    leave,
    need_a_compiler,
    unlink_segments,
)
from policies.errors import UserError

log = logging.getLogger("adapter")


@dataclass(frozen=True)
class Mpu:
    """The tp x dp grid in the form of Megatron-LM's `mpu`, which DeepSpeed asks for.

    tp: the ranks that share one model; replicas: this rank's counterparts in all copies of the model, whose number is
    dp; world: every rank of the job, its collectives counted beside those of tp.

    summing: in words how tp sums, and why so.
    """

    tp: Group
    replicas: Group
    world: Group
    summing: str = ""

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> Any:
        return self.tp.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self.replicas.size

    def get_data_parallel_group(self) -> Any:
        return self.replicas.group


def start(tp_size: int, megatron: Any = None, token_bytes: int = TOKEN_BYTES,
          facts: Mapping[str, str] | None = None) -> Mpu:
    """Join the job, check that its ranks make whole replicas and build the groups. Safe to call again in a process.

    megatron: the caller's own Megatron-style mpu, whose groups are taken as they are. token_bytes: of a hidden state,
    what a group sums most often. facts: what must be alike on all ranks, as agreement.require_alike takes it. Raises
    UserError where the world is not a multiple of tp_size, the rendezvous port is taken or the ranks are not alike.
    """
    launch = read_environment()
    if megatron is None:
        check_world(launch.world_size, tp_size)
    if not torch.distributed.is_initialized():
        init_process_group(launch)
        if get_accelerator().device_name() == "cpu":
            atexit.register(leave)
    if not dist.is_initialized():
        need_a_compiler()
        dist.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False,
                              timeout=TIMEOUT, auto_mpi_discovery=False)
    dist.barrier()  # every rank has mapped every segment, so their names can go
    unlink_segments()
    require_alike(Group(launch.rank, launch.world_size), {"tp_size": str(tp_size), **(facts or {})})
    groups = _grid(launch, tp_size) if megatron is None else _groups_of(megatron)
    return _counted(launch, token_bytes, *groups)


def _grid(launch: Launch, tp_size: int) -> tuple[Any, Any]:
    """This rank's tensor-parallel and data-parallel group, placed as Megatron-LM does: neighbours share a model. Every
    rank must call it, since torch wants every group made by all."""
    world = range(launch.world_size)
    tp = [_new_group(world[start:start + tp_size]) for start in world[::tp_size]]
    dp = [_new_group(world[first::tp_size]) for first in range(tp_size)]
    return tp[launch.rank // tp_size], dp[launch.rank % tp_size]


def _new_group(ranks: Sequence[int]) -> Any:
    return torch.distributed.new_group(list(ranks), timeout=TIMEOUT)  # DeepSpeed's would wait for torch's 30 minutes


def _groups_of(megatron: Any) -> tuple[Any, Any]:
    """The groups of a caller's mpu. Raises UserError where it lacks what Megatron-LM's has."""
    try:
        return bwc_tensor_model_parallel_group(megatron), megatron.get_data_parallel_group()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"mpu={megatron!r}: {error}; it must answer get_tensor_model_parallel_group() (or "
                        "get_model_parallel_group()) and get_data_parallel_group(), its groups initialised, as "
                        "Megatron-LM's parallel_state does") from None


def tp_size_of(megatron: Any) -> int:
    """Ranks that share one model, by a caller's mpu. Raises UserError as `start` does."""
    group, _ = _groups_of(megatron)
    return torch.distributed.get_world_size(group)


def _counted(launch: Launch, token_bytes: int, tp: Any, replicas: Any) -> Mpu:
    """The grid with its collectives counted and its all-reduce chosen, on which all ranks agree."""
    progress = _make_progress() if launch.world_size > 1 else None
    world = Group(launch.rank, launch.world_size, progress=progress)
    sharing = _group(tp, progress)
    ranks = torch.distributed.get_process_group_ranks(tp)
    route, summing = choose(world, sharing, ranks, launch, token_bytes, TIMEOUT.total_seconds())
    if launch.rank == 0 and sharing.size > 1:
        log.info("all-reduce: %s", summing)
    if launch.rank == 0 and sharing.size < world.size:
        log.info("replicas: %d, of %d rank%s each", world.size // sharing.size, sharing.size, "s" * (sharing.size > 1))
    return Mpu(replace(sharing, route=route), _group(replicas), world, summing)


def _group(group: Any, progress: Progress | None = None) -> Group:
    ranks = torch.distributed.get_process_group_ranks(group)
    return Group(ranks.index(torch.distributed.get_rank()), len(ranks), group, root=ranks[0], progress=progress)


def _make_progress() -> Progress | None:
    try:
        return Progress()
    except OSError as error:  # some sandboxes refuse the call
        log.warning("a rank that stalls will not be named: no shared memory to count collectives in (%s)", error)
        return None
