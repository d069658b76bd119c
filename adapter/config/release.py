"""The installed release of Transformers, as far as a family needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

from policies.errors import UserError
from policies.policy import Policy


def class_of(policy: Policy) -> Any:
    """Return the family's class of models. Raises UserError where the release has none, or one that computes otherwise
    than the family's page says."""
    found = getattr(transformers, policy.model_class, None)
    if found is None or Version(transformers.__version__) < Version(policy.first_release):
        raise UserError(f"model_type {policy.model_type} needs Transformers {policy.first_release} or later, and "
                        f"{transformers.__version__} is installed"
                        + (f": it has no {policy.model_class}" if found is None else ""))
    return found


def dense_config(directory: Path) -> Any:
    """Transformers' configuration of a model directory, without how its files are quantised: of a model whose weights
    are given to it decoded. Raises what Transformers raises where it cannot read config.json."""
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    for stated in ("quantization_config", "compression_config"):
        if hasattr(config, stated):
            delattr(config, stated)
    return config
