"""A model's modules by the names of the published checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from policies.policy import Policy


class PublishedModules(Mapping[str, nn.Module]):
    """Published name -> module of `model`, whatever its release of Transformers calls it.

    A look-up returns the module that is in the model now, and none is kept: one that was replaced is freed.
    names: published name -> the name in this model.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model = model
        self.names = {policy.published(name): name for name, _ in model.named_modules()}

    def __getitem__(self, published: str) -> nn.Module:
        return self.model.get_submodule(self.names[published])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def owner(self, published: str, suffix: str) -> tuple[nn.Module, str]:
        """The module that holds the parameter `suffix` of a module, and the parameter's name there: "conv1d.weight" is
        that of a module inside."""
        inside, _, name = suffix.rpartition(".")
        return self[published].get_submodule(inside), name

    def parameter(self, published: str, suffix: str) -> Any:
        """A parameter as the model holds it now, quantised or not; None where there is none."""
        module, name = self.owner(published, suffix)
        return getattr(module, name, None)

    def replace(self, published: str, module: nn.Module) -> None:
        """Put `module` in the place of the one with this name."""
        parent, _, child = self.names[published].rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)
