"""Small random Qwen2-VL checkpoints and inputs for tests: all weights random, no bias zero, names as published."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

IMAGE, VIDEO, VISION_START, VISION_END, EOS = 5, 6, 7, 8, 1
PATCH_VALUES = 3 * 2 * 14 * 14  # channels x frames x patch x patch, as pixel_values has them


@dataclass(frozen=True)
class Shape:
    """Geometry of a test model; head_dim 8 in both encoders unless stated."""

    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 8
    layers: int = 2
    mlp: int = 304
    vocab: int = 203
    tied: bool = False
    v_heads: int = 16
    v_head_dim: int = 4
    v_layers: int = 2

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def config(self) -> dict:
        v_hidden, half = self.v_heads * self.v_head_dim, self.head_dim // 2
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
            "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0,
            "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END, "hidden_act": "silu", "hidden_size": self.hidden,
            "initializer_range": 0.02, "intermediate_size": self.mlp, "max_position_embeddings": 4096,
            "max_window_layers": self.layers, "num_attention_heads": self.heads, "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": self.tied, "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False,
            "vision_config": {"depth": self.v_layers, "embed_dim": v_hidden, "mlp_ratio": 4, "in_chans": 3,
                              "num_heads": self.v_heads, "hidden_size": self.hidden, "patch_size": 14,
                              "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
            "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]},
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape, written down here on its own: the policies must agree with it, not feed it."""
        h, d, v, vm = self.hidden, self.head_dim, self.v_heads * self.v_head_dim, 4 * self.v_heads * self.v_head_dim
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h), "model.norm.weight": (h,)}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            out |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
                    p + "self_attn.o_proj.weight": (h, h), p + "mlp.gate_proj.weight": (self.mlp, h),
                    p + "mlp.up_proj.weight": (self.mlp, h), p + "mlp.down_proj.weight": (h, self.mlp)}
            for n, rows in (("q", self.heads * d), ("k", self.kv_heads * d), ("v", self.kv_heads * d)):
                out |= {f"{p}self_attn.{n}_proj.weight": (rows, h), f"{p}self_attn.{n}_proj.bias": (rows,)}
        if not self.tied:
            out["lm_head.weight"] = (self.vocab, h)
        out["visual.patch_embed.proj.weight"] = (v, 3, 2, 14, 14)
        for i in range(self.v_layers):
            p = f"visual.blocks.{i}."
            for n, rows, cols in (("attn.qkv", 3 * v, v), ("attn.proj", v, v), ("mlp.fc1", vm, v), ("mlp.fc2", v, vm)):
                out |= {f"{p}{n}.weight": (rows, cols), f"{p}{n}.bias": (rows,)}
            for n in ("norm1", "norm2"):
                out |= {f"{p}{n}.weight": (v,), f"{p}{n}.bias": (v,)}
        out |= {"visual.merger.ln_q.weight": (v,), "visual.merger.ln_q.bias": (v,)}
        for n, rows in (("0", vm), ("2", h)):
            out |= {f"visual.merger.mlp.{n}.weight": (rows, vm), f"visual.merger.mlp.{n}.bias": (rows,)}
        return out


DEFAULT = Shape()


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Seeded by name. Sized so that every part of the model matters: norms near 1, biases about 0.3, gain about 1.5."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    t = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.2 * t if ("norm" in name and name.endswith("weight")) or "ln_q.weight" in name else 0.3 * t
    inputs = t.shape[-1] if ".experts." in name else t[0].numel()
    return 0.3 * t if "embed_tokens" in name else t * (1.5 / inputs ** 0.5)


RENAMES = (("visual.", "model.visual."), ("model.", "model.language_model."))


def newer_name(name: str) -> str:
    """The name Transformers 4.52 and later give a published tensor."""
    return next((new + name[len(old):] for old, new in RENAMES if name.startswith(old)), name)


def make_checkpoint(
    directory: Path, shape: Shape = DEFAULT, dtype: torch.dtype = torch.float32, newer_names: bool = False,
    files: int = 2,
) -> Path:
    """Write config.json and `files` safetensors files with an index (one file: no index). Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config() | {"torch_dtype": str(dtype).split(".")[1]}))
    tensors = {n: random_tensor(n, s).to(dtype) for n, s in shape.tensors().items()}
    if newer_names:
        tensors = {newer_name(n): t for n, t in tensors.items()}
    names = list(tensors)
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    parts = [names[i::files] for i in range(files)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _grid(*thw: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(thw, dtype=torch.int64)


def _row(parts: list[tuple[int, int]], vocab: int, seed: int) -> list[int]:
    """[(token, count)] -> ids; token -1 stands for random text, image and video runs get their start and end marks."""
    generator = torch.Generator().manual_seed(seed)
    row: list[int] = []
    for token, count in parts:
        if token == -1:
            row += torch.randint(10, vocab, (count,), generator=generator).tolist()
        else:
            row += [VISION_START, *[token] * count, VISION_END]
    return row


def _inputs(rows: list[list[int]], images: torch.Tensor | None = None, videos: torch.Tensor | None = None) -> dict:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO)}
    generator = torch.Generator().manual_seed(3)
    media = (images, "pixel_values", "image_grid_thw"), (videos, "pixel_values_videos", "video_grid_thw")
    for grid, pixels, name in media:
        if grid is not None:
            out |= {pixels: torch.randn(int(grid.prod(1).sum()), PATCH_VALUES, generator=generator), name: grid}
    return out


FRAMES_IN_A_ROW = ("qwen2_vl", "qwen2_5_vl")  # families without text between the frames of a video


def cases(vocab: int = 203, family: str = "qwen2_vl") -> dict[str, dict[str, torch.Tensor]]:
    """Model inputs by case: text, one image, two images, video, and a left-padded batch of all sorts."""
    one, two, clip = _grid((1, 8, 6)), _grid((1, 4, 8), (1, 6, 4)), _grid((3, 4, 6))
    text = _row([(-1, 37)], vocab, 1)
    image = _row([(-1, 5), (IMAGE, 12), (-1, 9)], vocab, 2)
    pair = _row([(-1, 3), (IMAGE, 8), (-1, 4), (IMAGE, 6), (-1, 7)], vocab, 3)
    frames = [(VIDEO, 18)] if family in FRAMES_IN_A_ROW else [(-1, 2), (VIDEO, 6)] * 3
    video = _row([(-1, 4), *frames, (-1, 6)], vocab, 4)
    return {
        "text": _inputs([text]),
        "image": _inputs([image], one),
        "two_images": _inputs([pair], two),
        "video": _inputs([video], None, clip),
        "batch": _inputs([text[:11], image, video, pair], torch.cat([one, two]), clip),
    }
