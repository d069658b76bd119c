"""The published Qwen2-VL checkpoints as geometry, and sparse files of their size: true headers, holes as bodies."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from checkpoints import Shape

ENCODER = {"v_heads": 16, "v_head_dim": 80, "v_layers": 32}
PUBLISHED = {
    "2b": Shape(heads=12, kv_heads=2, head_dim=128, layers=28, mlp=8960, vocab=151936, tied=True, **ENCODER),
    "7b": Shape(heads=28, kv_heads=4, head_dim=128, layers=28, mlp=18944, vocab=152064, **ENCODER),
    "72b": Shape(heads=64, kv_heads=8, head_dim=128, layers=80, mlp=29568, vocab=152064, **ENCODER),
}
FILES = {"2b": 2, "7b": 5, "72b": 38}
TOTAL_BYTES = {"2b": 4_417_971_200, "7b": 16_582_751_232, "72b": 146_811_120_640}  # `total_size` of their indices


def write_sparse(directory: Path, shape: Shape, files: int) -> Path:
    """config.json, index and `files` bfloat16 safetensors files whose tensors take no disk. Returns the directory."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape.config()))
    tensors = list(shape.tensors().items())
    per_file, weight_map = math.ceil(len(tensors) / files), {}
    for i in range(files):
        name, at, header = f"model-{i + 1:05d}-of-{files:05d}.safetensors", 0, {}
        for tensor, dims in tensors[i * per_file : (i + 1) * per_file]:
            end = at + 2 * math.prod(dims)
            header[tensor] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}
            weight_map[tensor], at = name, end
        encoded = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
        os.truncate(directory / name, 8 + len(encoded) + at)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
