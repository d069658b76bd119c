"""What must be alike on all ranks of a job, for adapter.parallel.agreement. Paths may differ: hosts have own disks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from adapter.config.hub import shown
from adapter.config.schema import Config, TensorParallelSection
from adapter.planning.plan import Plan
from adapter.requests import identity


def facts_of_model(model: nn.Module, plan: Plan, parallel: TensorParallelSection,
                   section: Mapping[str, Any]) -> dict[str, str]:
    """section: of DeepSpeed. Objects in it are taken by their type alone, since their words may have an address."""
    config: Any = model.config
    defaults: Any = getattr(model, "generation_config", None)
    return {
        "tensor_parallel": parallel.model_dump_json(),
        "deepspeed": _json(section),
        "model.dtype": plan.dtype,
        "weights.format": plan.form.name,
        "model.attn_implementation": str(getattr(config, "_attn_implementation", None)),
        "the model's config.json": repr(plan.geometry),
        "its generation_config.json": _json({} if defaults is None else defaults.to_dict()),
    }


def facts_of_config(config: Config) -> dict[str, str]:
    """The other sections of a config file. Of the requests, which files they name is left out.

    Hosts that resolved a hub id's branch at different times may have different commits of it.
    """
    path = config.model.path
    return {
        "model.adapters": _json([identity.checkpoint(adapter) for adapter in config.model.adapters]),
        "commit of the model": path.name if shown(path) != str(path) else "none, a directory",
        "generation": _json(config.generation),
        "processor": config.processor.model_dump_json(),
        "batch_size": str(config.batch_size),
        "requests": _json([[r.id, r.prompt, r.system, r.expected] for r in config.requests]),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, skipkeys=True, default=lambda other: type(other).__name__)
