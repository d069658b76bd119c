"""Decode steps as graphs of the accelerator's. On a GPU a step is a thousand small kernels and bound by launching them
one by one; a graph launches them all at once (`torch.cuda.graph`, through DeepSpeed's accelerator).

`deepspeed.enable_cuda_graph`, which DeepSpeed itself has for one rank only, turns it on.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.generation.kv_cache import KVCache
from adapter.parallel.group import Group
from policies.errors import UserError

log = logging.getLogger("adapter")
KEY = "enable_cuda_graph"


Step = Callable[[Tensor, KVCache], Tensor]  # ids [rows], the cache -> logits [rows, vocab]


@dataclass(frozen=True)
class _Captured:
    """A graph, the ids [rows] that it reads and the logits [rows, vocab] that it writes."""

    graph: Any
    ids: Tensor
    logits: Tensor


class CudaGraphStep:
    """Decode steps captured once for each size of the cache and replayed from then on, as long as the engine lives.

    A size is (rows, length, attended places), each from a few buckets (adapter.generation.kv_cache). Graphs read the
    engine's buffers and weights at their addresses, so all are dropped when those move (`keep_for`). They share one
    memory pool. All ranks of a group must call it alike, for the graphs have their collectives in them.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.stream = accelerator.Stream()
        self.captured = dict[tuple[int, int, int], _Captured]()
        self.addresses: tuple[int, ...] = ()
        self.pool: Any = None
        atexit.register(_release, weakref.ref(self))

    def keep_for(self, addresses: tuple[int, ...]) -> None:
        """Drop the graphs of an earlier answer unless all that they read is still where it was."""
        if addresses != self.addresses:
            self.release()
            self.addresses = addresses

    def __call__(self, step: Step, ids: Tensor, cache: KVCache) -> Tensor:
        """One step. ids: int64 [batch], at most the cache's rows -> logits [batch, vocab], the caller's own."""
        size = cache.rows, cache.length, cache.attended
        if size not in self.captured:
            self.captured[size] = self._capture(step, ids, cache)
        captured = self.captured[size]
        captured.ids[:len(ids)].copy_(ids)
        self.accelerator.replay_graph(captured.graph)
        return captured.logits[:len(ids)].clone()  # the next replay writes over it

    def _capture(self, step: Step, ids: Tensor, cache: KVCache) -> _Captured:
        """Run the step once, since libraries allocate and groups connect in their first call, which nothing may while a
        graph is captured, and NCCL wants both on one stream; then capture it, which runs nothing."""
        given = ids.new_zeros(cache.rows)
        given[:len(ids)] = ids
        self.stream.wait_stream(self.accelerator.current_stream())
        with self.accelerator.stream(self.stream):
            step(given, cache)
            cache.place -= 1  # the replay makes this step again, in the same place
        self.accelerator.current_stream().wait_stream(self.stream)
        graph = self.accelerator.create_graph()
        with self.accelerator.capture_to_graph(graph, self.pool, self.stream):
            logits = step(given, cache)
        if self.pool is None:
            self.pool = graph.pool()
        return _Captured(graph, given, logits)

    def release(self) -> None:
        """Drop all graphs. At the end of the process this comes before its groups are destroyed, which would wait for
        the collectives in them."""
        if self.captured:
            self.accelerator.synchronize()
        self.captured.clear()
        self.pool = None


def _release(runner: weakref.ref[CudaGraphStep]) -> None:
    if alive := runner():
        alive.release()


def wanted(section: Mapping[str, Any], tp: Group, experts: int = 0, not_decoded: str = "") -> bool:
    """Whether steps are to be captured. section: arguments of deepspeed.init_inference. experts: that a token has.
    not_decoded: why Transformers' loop decodes this family; "" where it does not.

    Raises UserError where a step does what no graph can hold.
    """
    if not section.get(KEY):
        return False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        log.warning("deepspeed.%s: a CPU has no graphs; decode steps run operator by operator", KEY)
        return False
    if experts:
        raise UserError(f"deepspeed.{KEY}: this model's tokens choose experts, and which are read is decided outside a "
                        f"graph; leave {KEY} out")
    if not_decoded:
        raise UserError(f"deepspeed.{KEY}: Transformers' own loop decodes this model ({not_decoded}), which has no "
                        f"graphs; leave {KEY} out")
    needed = accelerator.communication_backend_name()
    if tp.size > 1 and (backend := dist.get_backend(tp.group)) != needed:
        raise UserError(f"deepspeed.{KEY}: the ranks sum over {backend}, which no graph can hold; start the job with "
                        f"{needed}, or leave {KEY} out")
    return True
