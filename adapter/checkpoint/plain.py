"""Whole tensors read the plain way: opened by the safetensors package, quantised ones unpacked byte by byte, no slices.

For verify and for one process, with which ranks are compared: nothing here is what a rank reads with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from adapter.checkpoint.quantised import Awq, Form, Fp8, Gptq
from adapter.checkpoint.safetensors import Checkpoint

Stored = Callable[[str], Tensor]  # ending of a name -> the whole stored tensor
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def read_plain(checkpoint: Checkpoint, name: str) -> Tensor:
    """A whole parameter by its published name, in the file's dtype; in float32 where it is stored quantised."""
    form, module = checkpoint.form, name.rpartition(".")[0]
    if not checkpoint.is_quantised(name):
        return _stored(checkpoint, name)
    decode = next(decode for kind, decode in DECODERS.items() if isinstance(form, kind))
    return decode(form, lambda ending: _stored(checkpoint, f"{module}.{ending}"))


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    info = checkpoint.tensors[name]
    with safe_open(info.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(info.name)
        return tensor


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [N, M] -> [N, M * 32 / bits] in float32, the lowest bits of a word first."""
    raw = words.contiguous().view(torch.uint8)  # little-endian, as all that runs PyTorch is
    return (raw if bits == 8 else torch.stack([raw & 15, raw >> 4], -1).flatten(-2)).float()


def _awq(form: Awq, stored: Stored) -> Tensor:
    scales = stored("scales").float()
    codes, zeros = (_fields(stored(ending), 4).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)[:, :scales.shape[1]]
                    for ending in ("qweight", "qzeros"))
    group = torch.arange(len(codes)) // (form.group if form.group > 0 else len(codes))
    return ((codes - zeros[group]) * scales[group]).t().contiguous()


def _gptq(form: Gptq, stored: Stored) -> Tensor:
    scales, group, zeros = stored("scales").float(), stored("g_idx").long(), stored("qzeros").long()
    if form.less_one:
        zeros += int("01" * 4 if form.bits == 8 else "1" * 8, 16)
    codes = _fields(stored("qweight").t(), form.bits)[:, :len(group)]
    zero = _fields(zeros.to(torch.int32), form.bits)[:, :scales.shape[1]]
    return (codes - zero[group].t()) * scales[group].t()


def _fp8(form: Fp8, stored: Stored) -> Tensor:
    weight = stored("weight").float()
    scale = stored("weight_scale_inv").float().repeat_interleave(form.rows, 0).repeat_interleave(form.columns, 1)
    return weight * scale[:weight.shape[0], :weight.shape[1]]


DECODERS: dict[type[Form], Callable[[Any, Stored], Tensor]] = {Awq: _awq, Gptq: _gptq, Fp8: _fp8}
