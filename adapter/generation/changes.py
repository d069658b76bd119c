"""What somebody has changed in a text decoder since it was sharded: hooks, forwards, modules.

A decode step computes the formula of the layers without calling them, so it is right only while nobody has put anything
into them. Everything outside the vision encoder counts, whose own forward runs in any case.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import module as torch_module

from adapter.generation.decoder import text_modules
from adapter.planning.plan import Plan

# methods of a model that a decode step does without
SKIPPED = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
# Transformers leaves hooks in the layers after a call that asked for attentions; outside such a call they do nothing
INERT = "transformers.utils.output_capturing"


class TextDecoderState:
    """What the modules outside the vision encoder were when the model had been sharded."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.kinds = {name: _kind(module) for name, module in text_modules(model, plan).items()}

    def change(self) -> str | None:
        """The first change that a decode step would not follow, in words; None where there is none."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "a hook on the forwards of all modules (register_module_forward_hook)"
        modules = text_modules(self.model, self.plan)
        for name, module in modules.items():
            where = name or type(module).__name__
            if hooks := list(_active_hooks(module)):
                return f"a hook on {where} ({hooks[0]})"
            if own := next((method for method in SKIPPED if method in module.__dict__), None):
                return f"{where} has a {own} of its own"
            if name not in self.kinds:
                return f"a new module {where} ({type(module).__name__})"
            if self.kinds[name] != _kind(module):
                was, now = self.kinds[name][0].__name__, type(module).__name__
                return f"{where} is a {now}, was a {was}" if was != now else f"{now}.forward has been replaced"
        return next((f"{name} is gone" for name in self.kinds if name not in modules), None)


def _kind(module: nn.Module) -> tuple[type, object]:
    return type(module), type(module).forward


def _active_hooks(module: nn.Module) -> Iterator[str]:
    """Names of the hooks that may see or change something."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if getattr(hook, "__module__", None) != INERT:
            yield getattr(hook, "__qualname__", type(hook).__name__)
