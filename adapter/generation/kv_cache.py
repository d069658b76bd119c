"""The KV cache: memory that an engine allocates once, and what of it the sequences of one answer use."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

SMALLEST = 256  # places of the smallest bucket


class Buffers:
    """Named memory that an engine keeps between answers: it grows to the largest answer and is reused by the others.

    generation: counts how often memory moved; what kept an address (a CUDA graph) is void after that.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._flat = dict[str, Tensor]()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of this shape, with whatever the last answer left in it. The same name, shape and dtype
        give the same address until the memory has to grow."""
        count, flat = prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < count or flat.dtype is not dtype or flat.device != device:
            self._flat.pop(name, None)
            flat = None  # freed before the larger one is allocated
            flat = self._flat[name] = torch.empty(count, dtype=dtype, device=device)
            self.generation += 1
        return flat[:count].view(shape)


@dataclass(frozen=True)
class Room:
    """What one answer takes of the buffers: rows, places a row (length), and entries of the rotary tables (tables).

    zeroed: a step looks at rows and places that no sequence has filled, which must hold numbers then.
    """

    rows: int
    length: int
    tables: int
    zeroed: bool

    @classmethod
    def exact(cls, batch: int, prompt: int, length: int) -> Room:
        """Room for just these sequences, of `length` tokens at most."""
        return cls(batch, length, length - prompt, False)

    @classmethod
    def bucket(cls, batch: int, length: int) -> Room:
        """The same for every answer of about this size: rows and length are powers of two, so that one CUDA graph
        serves them all."""
        length = length_bucket(length)
        return cls(1 << (batch - 1).bit_length(), length, length, True)


def length_bucket(length: int) -> int:
    """The smallest power of two that is no less, and at least SMALLEST."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


@dataclass
class KVCache:
    """The sequences of one answer, in an engine's buffers.

    keys, values: of each layer [rows, KV heads, length, head_dim]. cos, sin: [tables, rows, head_dim], the rotary
    tables of the positions after the prompt. first: int64 [rows], the first place of each row that is no padding.
    prompt, place: int64 [1], the length of the prompt and the place of the next token. They stay at their addresses
    and are changed in place, so that a CUDA graph can read them.
    attended: how many places, from the first of the cache on, a step looks at.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    first: Tensor
    prompt: Tensor
    place: Tensor
    attended: int

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def rope_at_place(self) -> tuple[Tensor, Tensor]:
        """cos, sin [rows, head_dim] of the next token."""
        step = self.place - self.prompt
        return self.cos[step][0], self.sin[step][0]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, KV heads, attended, head_dim] of one layer, views of the cache."""
        keys, values = self.keys[i], self.values[i]
        if self.attended == self.length:
            return keys, values
        return keys[:, :, :self.attended], values[:, :, :self.attended]

    def write(self, i: int, keys: Tensor, values: Tensor) -> None:
        """Put a prompt's keys and values [batch, KV heads, prompt, head_dim] of layer i into the first places."""
        batch, _, prompt, _ = keys.shape
        self.keys[i][:batch, :, :prompt] = keys
        self.values[i][:batch, :, :prompt] = values
