"""The commands that bad input is given to, imported before any fork; whatever needs Transformers imports it later."""

from __future__ import annotations

from adapter.commands import generate, plan

COMMANDS = {"plan": plan.main, "generate": generate.main}
