"""Writers of quantised checkpoints: a small dense one, packed in the layouts that AutoAWQ, AutoGPTQ and FP8
releases have, and the dense model that it stands for. Nothing here is shared with the reader."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs in a word's fields, the lowest bits first: AutoAWQ's order_map
Packed = dict[str, Tensor]


def pack(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last dimension, 32 / bits codes a word; int32."""
    per = 32 // bits
    filled = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    word = sum(filled[..., (order or range(per))[field]] << bits * field for field in range(per))
    return ((word + 2**31) % 2**32 - 2**31).to(torch.int32)


def grouped(weight: Tensor, bits: int, group: int, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """weight [outputs, inputs] -> codes int64 alike, zeros int64 and scales float16 [outputs, groups]."""
    parts, top = weight.float().unflatten(1, (-1, group)), 2**bits - 1
    if sym:
        scale = (parts.abs().amax(-1) / (top // 2)).half()
        zero = torch.full(scale.shape, (top + 1) // 2)
    else:
        low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().long().clamp(0, top)
    codes = ((parts / scale.float()[..., None]).round().long() + zero[..., None]).clamp(0, top)
    return codes.flatten(1), zero, scale


def awq(weight: Tensor, group: int) -> tuple[Packed, Tensor]:
    """The stored tensors and the weight that they stand for, float32."""
    codes, zero, scale = grouped(weight, 4, group, sym=False)
    stored = {"qweight": pack(codes.t(), 4, AWQ_ORDER), "qzeros": pack(zero.t(), 4, AWQ_ORDER), "scales": scale.t()}
    return stored, elementwise(codes, zero, scale, [i // group for i in range(codes.shape[1])])


def gptq(weight: Tensor, group: int, bits: int = 4, sym: bool = True, v2: bool = False,
         desc_act: bool = False) -> tuple[Packed, Tensor]:
    """desc_act: inputs are dealt to groups in another order."""
    generator = torch.Generator().manual_seed(len(weight))
    order = torch.randperm(weight.shape[1], generator=generator) if desc_act else torch.arange(weight.shape[1])
    sorted_codes, zero, scale = grouped(weight[:, order], bits, group, sym)
    codes, index = torch.empty_like(sorted_codes), torch.empty(weight.shape[1], dtype=torch.int32)
    codes[:, order] = sorted_codes
    index[order] = (torch.arange(weight.shape[1]) // group).int()
    words = pack(zero.t(), bits).long()
    if not v2:  # a zero of 0 borrows from the next field, as in GPTQModel
        words -= 0x11111111 if bits == 4 else 0x01010101
    words = ((words + 2**31) % 2**32 - 2**31).to(torch.int32)
    stored = {"qweight": pack(codes, bits).t(), "qzeros": words, "scales": scale.t(), "g_idx": index}
    return stored, elementwise(codes, zero, scale, index.tolist())


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Packed, Tensor]:
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes, dense = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for a in range(scale.shape[0]):
        for b in range(scale.shape[1]):
            here = slice(a * block[0], (a + 1) * block[0]), slice(b * block[1], (b + 1) * block[1])
            scale[a, b] = (weight[here].float().abs().max() / 448).bfloat16().float()
            codes[here] = (weight[here].float() / scale[a, b]).to(torch.float8_e4m3fn)
            dense[here] = codes[here].float() * scale[a, b]
    return {"weight": codes, "weight_scale_inv": scale.bfloat16()}, dense


def elementwise(codes: Tensor, zero: Tensor, scale: Tensor, group: list[int]) -> Tensor:
    """(code - zero) * scale, column after column."""
    columns = [(codes[:, i] - zero[:, g]).float() * scale[:, g].float() for i, g in enumerate(group)]
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class Kind:
    """A form to write: `quantise` one weight, and what config.json says of it."""

    quantise: Callable[[Tensor], tuple[Packed, Tensor]]
    section: Mapping[str, Any] = field(hash=False)


def kind(method: str, group: int = 16, **options: Any) -> Kind:
    """awq, gptq (bits, sym, v2, desc_act) or fp8 (group: rows and columns of a block)."""
    skipped = {"modules_to_not_convert": ["visual"]}
    if method == "awq":
        return Kind(lambda w: awq(w, group), {"bits": 4, "group_size": group, "quant_method": "awq", "version": "gemm",
                                              "zero_point": True} | skipped)
    if method == "fp8":
        return Kind(lambda w: fp8(w, (group, group)), {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [group, group]} | skipped)
    section = {"bits": options.get("bits", 4), "group_size": group, "desc_act": options.get("desc_act", False),
               "sym": options.get("sym", True), "quant_method": "gptq", "true_sequential": True}
    if options.get("v2"):
        section["checkpoint_format"] = "gptq_v2"
    return Kind(lambda w: gptq(w, group, **options), section)


KINDS = {
    "awq": kind("awq"), "gptq4": kind("gptq"), "gptq8": kind("gptq", bits=8),
    "gptq4_asymmetric": kind("gptq", sym=False), "gptq8_v2": kind("gptq", bits=8, sym=False, v2=True),
    "gptq4_act_order": kind("gptq", sym=False, v2=True, desc_act=True),
    "fp8": kind("fp8"), "fp8_parts": kind("fp8", 48),
}


def quantised(dense: Path, out: Path, kind: Kind, *, decoded: Path | None = None,
              which: tuple[str, ...] = ("proj.weight",)) -> Path:
    """Write `dense` again with its weights outside of the vision encoder quantised whose names end so, to `out`; to
    `decoded` the dense model that this stands for, in float32. Returns `out`."""
    out.mkdir(parents=True)
    for file in dense.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, out / file.name)
    if decoded:
        shutil.copytree(out, decoded)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": kind.section}))
    stored, meant = Packed(), Packed()
    for file in sorted(dense.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "visual" in name or not name.endswith(which):
                stored[name] = meant[name] = tensor
                continue
            parts, meant[name] = kind.quantise(tensor)
            stored |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
    save(stored, out)
    if decoded:
        save(meant, decoded)
    return out


def save(tensors: Packed, directory: Path) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def sparse_awq(directory: Path, shape: Shape, group: int = 128) -> Path:
    """The header of an AWQ release of this geometry, and a hole in place of its body: every code, zero and scale is 0.
    Returns the directory."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(
        shape.config() | {"quantization_config": kind("awq", group).section}))
    header, at = dict[str, Any](), 0
    for name, dims in shape.tensors().items():
        stored = {name: ("F16", dims)}
        if name.endswith("proj.weight") and not name.startswith("visual"):
            (out, width), module = dims, name.removesuffix("weight")
            stored = {f"{module}qweight": ("I32", (width, out // 8)), f"{module}scales": ("F16", (width // group, out)),
                      f"{module}qzeros": ("I32", (width // group, out // 8))}
        for tensor, (dtype, size) in stored.items():
            end = at + math.prod(size) * (4 if dtype == "I32" else 2)
            header[tensor], at = {"dtype": dtype, "shape": size, "data_offsets": [at, end]}, end
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(directory / "model.safetensors", 8 + len(encoded) + at)
    return directory
