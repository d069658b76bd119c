"""How the ranks of a job meet: torch's process group on loopback or between hosts, and what ends it."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from adapter.kernels.build import missing_tools
from adapter.parallel.devices import take_device
from adapter.parallel.launchers import Launch, how_to_start, launcher_known
from policies.errors import UserError

TIMEOUT = timedelta(minutes=10)  # of any collective: the longest a rank may wait while another decodes a video


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_world(world_size: int, tp_size: int) -> None:
    """Raises UserError where the ranks of the job do not make whole replicas of tp_size ranks."""
    if world_size % tp_size == 0:
        return
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    why = " (you started without a launcher)" if world_size == 1 and not launcher_known() else ""
    fit = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
    raise UserError(f"this job has {ranks}{why}, tensor_parallel.tp_size is {tp_size}: each of the tp_size shards "
                    "needs a rank of its own, and more ranks must make whole replicas. Start so many, "
                    f"`{how_to_start(tp_size)}`, or a multiple, or set tensor_parallel.tp_size to "
                    f"{'one of ' * (world_size > 1)}{fit}")


def init_process_group(launch: Launch) -> None:
    """Join torch's process group, each rank on a device of its own. Raises UserError where that cannot be."""
    store = torch.distributed.PrefixStore("qwenvl_tp", _store(launch))
    take_device(launch, store)
    torch.distributed.init_process_group(get_accelerator().communication_backend_name(), store=store, timeout=TIMEOUT,
                                         rank=launch.rank, world_size=launch.world_size)


def _store(launch: Launch) -> torch.distributed.Store:
    """The key-value store through which the ranks meet: on loopback alone in a job of one host, unlike env://'s."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if launch.one_host and address in LOOPBACK and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        listener = _listen(port) if launch.rank == 0 else None
        return torch.distributed.TCPStore("127.0.0.1", port, launch.world_size, launch.rank == 0, timeout=TIMEOUT,
                                          wait_for_workers=False, master_listen_fd=listener,
                                          use_libuv=False)  # torch 2.5's libuv takes no socket that listens already
    try:
        return next(torch.distributed.rendezvous("env://", launch.rank, launch.world_size, timeout=TIMEOUT))[0]
    except torch.distributed.DistNetworkError as error:
        raise UserError(f"the rendezvous at {address}:{port} failed: {str(error).splitlines()[0]}. Is another job "
                        "using that port there? Start with another MASTER_PORT (deepspeed --master_port)") from None


def leave() -> None:
    """gloo's threads may abort a process that ends in its group (pytorch#190489). After an exception it stays there:
    leaving waits for a collective that is under way, and the others may never come to it."""
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


def _listen(port: int) -> int:
    """File descriptor of a socket that listens on 127.0.0.1:port; the store closes it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}); is another job running? "
                        "Start with `deepspeed --master_port N ...` and a free N") from None
    listener.listen(1024)
    return listener.detach()


def need_a_compiler() -> None:
    """Without ninja or a compiler DeepSpeed raises where it builds its shared-memory op; mark it as not there."""
    if missing_tools():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def unlink_segments() -> None:
    """Remove the names of DeepSpeed's /dev/shm segments of this job; the mappings stay until the processes end."""
    parts = (os.getuid(), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), os.environ.get("RANK"))
    Path("/dev/shm", "deepspeed_allreduce_buffer_{}_{}_{}_{}".format(*parts)).unlink(missing_ok=True)
