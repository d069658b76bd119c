"""A model's modules by the names of the published checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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

    def replace(self, published: str, module: nn.Module) -> None:
        """Put `module` in the place of the one with this name."""
        parent, _, child = self.names[published].rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)
