"""The model of a config.json as Transformers builds it, with no weight in memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from adapter.config.release import class_of, dense_config
from policies.errors import UserError
from policies.policy import Policy


class _ParametersOnMeta(TorchFunctionMode):
    """Allocations go to `meta`, computed values do not: weights take no memory, rotary frequencies are really computed.

    `torch.device("meta")` would take both, and a non-persistent buffer left on meta has no file to come back from.
    """

    ALLOCATIONS = (torch.empty, torch.ones, torch.zeros)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.ALLOCATIONS:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(directory: Path, policy: Policy, dtype: torch.dtype, attn_implementation: str) -> nn.Module:
    """The model of a directory's config.json as Transformers builds it, every parameter on `meta`.

    Raises UserError where Transformers refuses the config or the attention implementation.
    """
    model_class = class_of(policy)
    try:
        config = dense_config(directory)
        config.torch_dtype = dtype
        with _ParametersOnMeta(), _silent_initialisation():
            model = model_class._from_config(config, attn_implementation=attn_implementation)
        if (directory / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{directory}: Transformers {transformers.__version__} cannot build {policy.model_class} with "
                        f"attn_implementation {attn_implementation!r}: {error}"
                        + ("; model.attn_implementation=sdpa needs no package" if "flash" in attn_implementation
                           else "")) from error
    return model.eval()


@contextmanager
def _silent_initialisation() -> Iterator[None]:
    """Transformers' own switch against initialising weights (its home moved in release 5)."""
    home: Any = transformers.modeling_utils
    if not hasattr(home, "no_init_weights"):
        home = importlib.import_module("transformers.initialization")
    with home.no_init_weights():
        yield
