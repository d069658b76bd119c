"""What a stored form is: the tensors of the files that hold one matrix, and how a part of the matrix is read from them.

A form reads only what a slice needs: the words, groups and blocks of codes that enclose it, which are cut after they
are decoded. So a rank's boundaries may lie anywhere, and a slice is bit for bit the slice of the decoded whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from policies.errors import UserError
from policies.rules import Range, TensorSlice

if TYPE_CHECKING:
    from torch import Tensor

Fetch = Callable[[str, TensorSlice], "Tensor"]  # (ending of a stored tensor's name, slice of it) -> what the file has
FLOATS = ("F16", "BF16", "F32")
MOST = 1 << 20  # of a group or block: beyond is a broken config.json


@dataclass(frozen=True)
class Form(ABC):
    """How the weights [outputs, inputs] of linear layers are stored: `M.weight` in tensors `M.qweight` and so on.

    bits: of a code. dtypes: ending of a stored tensor's name -> safetensors' names of the dtypes that it may have.
    spare: endings of tensors that some writers add to layers that have no such parameter, and that must be zero.
    """

    dtypes: ClassVar[Mapping[str, tuple[str, ...]]]
    spare: ClassVar[tuple[str, ...]] = ()
    bits: int

    @abstractmethod
    def __str__(self) -> str:
        """What it is, for people."""

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Ending -> shape of the tensors that hold a matrix of this shape [outputs, inputs]."""

    @abstractmethod
    def block(self, shape: tuple[int, ...], outputs: Range, inputs: Range, fetch: Fetch) -> Tensor:
        """Rows `outputs` and columns `inputs` of a matrix of this shape, in float32; one of the two ranges is whole.

        Raises IndexError where stored numbers name a group that is not there.
        """

    def read(self, part: TensorSlice, fetch: Fetch) -> Tensor:
        """A slice of a matrix in float32. Raises IndexError where stored numbers name a group that is not there."""
        import torch

        outputs, inputs = (0, part.shape[0]), (0, part.shape[1])
        if part.dim is None:
            return self.block(part.shape, outputs, inputs, fetch)
        blocks = [self.block(part.shape, *((r, inputs) if part.dim == 0 else (outputs, r)), fetch) for r in part.ranges]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, part.dim)


def covering(span: Range, size: int) -> Range:
    """The words, groups or blocks of `size` elements that enclose a range of elements."""
    return span[0] // size, -(-span[1] // size)


def inside(span: Range, covered: Range, size: int) -> slice:
    """Where a range of elements lies in what `covering` it was read."""
    start = span[0] - covered[0] * size
    return slice(start, start + span[1] - span[0])


def window(shape: tuple[int, ...], rows: Range, columns: Range) -> TensorSlice:
    """A part of a stored matrix, of which at least one of the two ranges is whole; the first where both are."""
    if rows != (0, shape[0]):
        assert columns == (0, shape[1]), (shape, rows, columns)
        return TensorSlice(shape, 0, (rows,))
    return TensorSlice(shape) if columns == (0, shape[1]) else TensorSlice(shape, 1, (columns,))


def number(section: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of `quantization_config`. Raises UserError where it is something else, or absurd."""
    value = section.get(key, default)
    if type(value) is not int or not -MOST <= value <= MOST:
        raise UserError(f"quantization_config.{key} = {value!r}: a whole number is needed")
    return value


def group_size(section: Mapping[str, Any]) -> int:
    """Inputs that share a scale; -1: all of a row. Raises UserError where the config has something else."""
    group = number(section, "group_size", 128)
    if group < 1 and group != -1:
        raise UserError(f"quantization_config.group_size = {group}: a positive number is needed, or -1 for whole rows")
    return group


def stated(section: Mapping[str, Any], keys: tuple[str, ...], default: str) -> str:
    """The first of these keys that is stated, in small letters."""
    value = next((section[key] for key in keys if section.get(key) is not None), default)
    return str(value)[:60].lower()
