"""Does each package import, and what does it say about itself? Started by the doctor as a process of its own.

    python -m adapter.doctor.probe torch deepspeed ...

A package that crashes or hangs while it is imported takes this process with it, not the doctor. stdout: a JSON line for
each package as soon as it has answered, so that the first without a line is the one that broke. torch and DeepSpeed
answer with their own reports, torch.utils.collect_env and ds_report.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from contextlib import redirect_stdout
from typing import Any

from adapter.commands.common import Results

PROCESSOR = r"^(Model name|CPU\(s\)|Thread\(s\) per core|NUMA node\(s\)):\s+(.+)$"  # of its cpu_info, which is lscpu's


def _torch() -> dict[str, Any]:
    from torch.utils.collect_env import get_env_info

    found = get_env_info()._asdict()
    processor = dict(re.findall(PROCESSOR, found.get("cpu_info") or "", re.MULTILINE))
    left_out = ("pip_packages", "conda_packages", "cpu_info")
    said = {name: value for name, value in found.items() if name not in left_out and value not in (None, {}, "N/A")}
    return said | processor


def _deepspeed() -> dict[str, Any]:
    from deepspeed import env_report
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    from adapter.kernels.build import missing_tools

    with redirect_stdout(io.StringIO()) as printed:
        env_report.main(hide_operator_status=True)
    accelerator = get_accelerator()
    return {"accelerator": accelerator.device_name(), "devices": accelerator.device_count(),
            "backend": accelerator.communication_backend_name(), "bfloat16": accelerator.is_bf16_supported(),
            "missing_tools": missing_tools(),
            "build_root": os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(),
            "waits_for_lock_files": hasattr(cpp_extension, "FileBaton"),  # later releases lock through the kernel
            **dict(re.findall(r"^(.+?) \.+ (.+?) *$", printed.getvalue(), re.MULTILINE))}


def _psutil() -> dict[str, Any]:
    from adapter.parallel.network import interfaces

    return {"interfaces": {name: address for name, address in interfaces() if ":" not in address}}


ANSWERS = {"torch": _torch, "deepspeed": _deepspeed, "psutil": _psutil}


def main(names: list[str]) -> None:
    results = Results()
    for name in names:
        try:
            importlib.import_module(name)
            results.write({"package": name, "facts": ANSWERS[name]() if name in ANSWERS else {}})
        except BaseException as error:  # whatever a broken package raises, SystemExit included
            results.write({"package": name, "error": f"{type(error).__name__}: {error}"[:600]})


if __name__ == "__main__":
    main(sys.argv[1:])
