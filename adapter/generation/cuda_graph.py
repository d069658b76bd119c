"""A decode step as a graph of the accelerator's. On a GPU a step is a thousand small kernels and bound by launching
them one by one; a graph launches them all at once (`torch.cuda.graph`, through DeepSpeed's accelerator).

`deepspeed.enable_cuda_graph`, which DeepSpeed itself has for one rank only, turns it on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.parallel.group import Group
from policies.errors import UserError

log = logging.getLogger("adapter")
KEY = "enable_cuda_graph"


class CudaGraphStep:
    """A step captured at its second call and replayed from then on.

    The first call runs as it is: libraries allocate and groups connect in it, which nothing may while a graph is
    captured. Whatever else the step reads must stay where it is between calls, and be changed in place only. All ranks
    of a group must call it equally often, for the graph has their collectives in it.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], accelerator: Any) -> None:
        self.step, self.accelerator = step, accelerator
        self.warm, self.graph = False, None
        self.given: Tensor  # what the graph reads
        self.result: Tensor  # what it writes

    def __call__(self, ids: Tensor) -> Tensor:
        if not self.warm:
            self.warm = True
            return self.step(ids)
        if self.graph is None:
            self.given, self.graph = ids.clone(), self.accelerator.create_graph()
            with self.accelerator.capture_to_graph(self.graph):  # launches nothing: the step is made by the replay
                self.result = self.step(self.given)
        self.given.copy_(ids)
        self.accelerator.replay_graph(self.graph)
        return self.result.clone()  # the next replay writes over it


def wanted(section: Mapping[str, Any], tp: Group) -> bool:
    """Whether steps are to be captured. section: arguments of deepspeed.init_inference.

    Raises UserError where the ranks sum through what no graph can hold.
    """
    if not section.get(KEY):
        return False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        log.warning("deepspeed.%s: a CPU has no graphs; decode steps run operator by operator", KEY)
        return False
    needed = accelerator.communication_backend_name()
    if tp.size > 1 and (backend := dist.get_backend(tp.group)) != needed:
        raise UserError(f"deepspeed.{KEY}: the ranks sum over {backend}, which no graph can hold; start the job with "
                        f"{needed}, or leave {KEY} out")
    return True
