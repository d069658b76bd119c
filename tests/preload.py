"""What the fork server of tests/forking.py imports before it forks ranks: libraries, both packages, C++ operators."""

from __future__ import annotations

import importlib
import os
import pkgutil

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # read at import; a command sets the former

import transformers
from deepspeed.accelerator import get_accelerator

import adapter
import policies
from adapter.kernels import build

LAZY = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "GenerationConfig", "Qwen2VLForConditionalGeneration",
        "Qwen2VLImageProcessor", "Qwen2VLProcessor", "Qwen2VLVideoProcessor")


def modules(package) -> list[str]:
    """Names of every module of a package that is no script."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [module.name for module in found if not module.name.endswith("__main__") and ".peers." not in module.name]


for name in LAZY:  # Transformers imports a class when it is first asked for
    getattr(transformers, name, None)  # an older release may lack it
for name in (*modules(policies), *modules(adapter)):
    importlib.import_module(name)
build.unavailable()
try:
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
except Exception as error:
    print(f"DeepSpeed's shared-memory op is not loaded: {error}")  # a job says so itself
