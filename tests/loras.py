"""LoRA adapters of random numbers, as PEFT writes them, for the checkpoints of checkpoints.py and families.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from checkpoints import random_tensor
from safetensors.torch import save_file

PREFIX = "base_model.model."
ATTENTION = ("attn.qkv", "attn.proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.fc1", "mlp.fc2", "mlp.0", "mlp.2",
          "lm_head")


def linears(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Module -> shape of every linear layer of both encoders and the head, of parameter name -> shape."""
    found = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {name: shape for name, shape in found.items() if name.endswith(LINEAR)}


def make_lora(directory: Path, modules: Mapping[str, tuple[int, ...]], r: int = 4, dtype: torch.dtype = torch.float32,
              rename: Callable[[str], str] = str, seed: str = "", **config: object) -> Path:
    """Write an adapter of modules (name -> [out, in]). rename: of modules, for the file. Returns the directory."""
    directory.mkdir(parents=True)
    tensors = {}
    for name, (rows, columns) in modules.items():
        for half, shape in (("A", (r, columns)), ("B", (rows, r))):
            tensor = random_tensor(f"{seed}{name}.{half}", shape).to(dtype)
            tensors[f"{PREFIX}{rename(name)}.lora_{half}.weight"] = tensor
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    stated = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "bias": "none",
              "target_modules": [rename(name) for name in modules], **config}
    (directory / "adapter_config.json").write_text(json.dumps(stated))
    return directory
