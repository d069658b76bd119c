"""model_type -> policy, found in policies/families/: the only place that knows model names."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from policies import families
from policies.errors import UserError
from policies.policy import Policy


def _pages() -> dict[str, Policy]:
    """Model type -> POLICY of every module in policies/families/."""
    names = [page.name for page in pkgutil.iter_modules(families.__path__)]
    pages: list[Policy] = [importlib.import_module(f"{families.__name__}.{name}").POLICY for name in names]
    return {policy.model_type: policy for policy in pages}


POLICIES: Mapping[str, Policy] = _pages()


# relatives that have no page, and what a page of theirs could not say today
UNSUPPORTED: Mapping[str, str] = {
    "qwen3_5_moe": "beside its experts every layer has a shared expert with a gate of its own, which no rule cuts",
    "qwen4_exp": "it has hyper-connections, a sparse indexer and an n-gram table of 45 billion numbers",
    "qwen2_5_omni": "it has an audio encoder beside the vision encoder",
    "qwen3_omni_moe": "it has experts and an audio encoder",
}


def policy_for(config: Mapping[str, Any], where: str = "config.json") -> Policy:
    """The policy of a config.json mapping. Raises UserError that names the known types and the nearest one."""
    model_type = str(config.get("model_type"))
    if model_type in POLICIES:
        return POLICIES[model_type]
    if model_type in UNSUPPORTED:
        raise UserError(f"{where}: model_type {model_type!r} cannot be split yet: {UNSUPPORTED[model_type]}; known: "
                        f"{', '.join(sorted(POLICIES))}")
    model_type = model_type[:100]
    near = difflib.get_close_matches(model_type, POLICIES, n=1, cutoff=0.5)
    hint = f" The nearest known one is {near[0]!r}." if near else ""
    if not any("vision" in str(key) for key in config):
        hint += " There is no vision_config in it: is it a model of text alone?"
    raise UserError(f"{where}: no policy for model_type {model_type!r}; known: {', '.join(sorted(POLICIES))}.{hint} "
                    "A new family is one page in policies/families/.")
