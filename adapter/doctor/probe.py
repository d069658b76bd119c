"""Does each package import, and what does it say about itself? Started by the doctor as a process of its own.

    python -m adapter.doctor.probe torch deepspeed ...

A package that crashes or hangs while it is imported takes this process with it, not the doctor. stdout: a JSON line for
each package as soon as it has answered, so that the first without a line is the one that broke. torch and DeepSpeed
answer with their own reports, torch.utils.collect_env and ds_report.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from adapter.commands.common import Results

ENVIRONMENT = ("os", "libc_version", "python_platform", "gcc_version", "nvidia_driver_version", "nvidia_gpu_models",
               "cuda_runtime_version", "cudnn_version")  # of torch.utils.collect_env
PROCESSOR = r"^(Model name|CPU\(s\)|Thread\(s\) per core|NUMA node\(s\)):\s+(.+)$"  # of its cpu_info, which is lscpu's


def _torch() -> dict[str, Any]:
    import torch
    from torch.utils.collect_env import get_env_info

    environment = get_env_info()._asdict()
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else 0
    cards = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "cuda_available": cuda,
            "cards": [{"name": c.name, "bytes": c.total_memory} for c in cards],
            "peers": all(torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
            "environment": {name: environment.get(name) for name in ENVIRONMENT},
            "cpu": dict(re.findall(PROCESSOR, environment.get("cpu_info") or "", re.MULTILINE))}


def _torchvision() -> dict[str, Any]:
    import torch
    import torchvision

    assert torch.ops.torchvision.nms  # the operator that is missing where the two were built apart
    return {"version": torchvision.__version__}


def _deepspeed() -> dict[str, Any]:
    import deepspeed
    from deepspeed import env_report
    from deepspeed.accelerator import get_accelerator

    with redirect_stdout(io.StringIO()) as printed:
        env_report.main(hide_operator_status=True)
    accelerator = get_accelerator()
    dtypes = [name for name, held in (("float16", accelerator.is_fp16_supported()),
                                      ("bfloat16", accelerator.is_bf16_supported())) if held]
    return {"version": deepspeed.__version__, "accelerator": accelerator.device_name(),
            "devices": accelerator.device_count(), "backend": accelerator.communication_backend_name(),
            "dtypes": ["float32", *dtypes], "op": bool(deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm")),
            "ds_report": dict(re.findall(r"^(.+?) \.+ (.+?) *$", printed.getvalue(), re.MULTILINE))}


def _transformers() -> dict[str, Any]:
    import transformers

    from policies.registry import POLICIES

    for policy in POLICIES.values():
        getattr(transformers, policy.model_class)
    return {"version": transformers.__version__}


def _mpi4py() -> dict[str, Any]:
    import mpi4py

    mpi4py.rc.initialize = False  # under mpirun that would wait for the other ranks
    from mpi4py import MPI

    return {"version": mpi4py.__version__, "library": MPI.Get_library_version().strip("\0 \n").splitlines()[0]}


ANSWERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch, "torchvision": _torchvision, "deepspeed": _deepspeed, "transformers": _transformers,
    "mpi4py": _mpi4py,
}


def main(names: list[str]) -> None:
    results = Results()
    for name in names:
        try:
            facts = ANSWERS[name]() if name in ANSWERS else _version(name)
            results.write({"package": name, "facts": facts})
        except BaseException as error:  # whatever a broken package raises, SystemExit included
            results.write({"package": name, "error": f"{type(error).__name__}: {error}"[:600]})


def _version(name: str) -> dict[str, Any]:
    return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}


if __name__ == "__main__":
    main(sys.argv[1:])
