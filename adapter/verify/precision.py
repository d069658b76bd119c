"""Products that accumulate in float32, as adapter.verify.bounds assumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
           "allow_fp16_accumulation")


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, no product of CUDA's rounds between its additions; what the caller had set is restored at the end.

    torch allows cuBLAS to add the parts of a split sum in bfloat16 or float16, and cuDNN to round float32 operands to
    TF32, unless it is set not to (torch's CUDA semantics, "Reduced Precision Reduction" and "TensorFloat-32").
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _settings()]
    try:
        for owner, name, value in _settings():
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _settings() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, its value for full precision) of every setting that this release of torch has."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found: list[tuple[Any, str, Any]] = [(matmul, name, False) for name in REDUCED if _is_there(matmul, name)]
    for owner, newer in ((matmul, matmul), (cudnn, getattr(cudnn, "conv", None))):
        try:
            bool(owner.allow_tf32)
            found.append((owner, "allow_tf32", False))
        except RuntimeError:  # the caller uses torch 2.9's names, which cannot be mixed with the older ones
            found.append((newer, "fp32_precision", "ieee"))
    return found


def _is_there(owner: Any, name: str) -> bool:
    try:
        getattr(owner, name)
    except AttributeError:
        return False
    return True
