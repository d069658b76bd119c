"""The installed release of Transformers, as far as a family needs it."""

from __future__ import annotations

from typing import Any

import transformers

from policies.errors import UserError
from policies.policy import Policy


def class_of(policy: Policy) -> Any:
    """Return the family's class of models. Raises UserError where the release has none."""
    if found := getattr(transformers, policy.model_class, None):
        return found
    raise UserError(f"model_type {policy.model_type} needs Transformers {policy.first_release} or later, and "
                    f"{transformers.__version__} is installed: it has no {policy.model_class}")
