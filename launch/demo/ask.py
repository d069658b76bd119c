"""Ask a checkpoint the demo's questions and measure how many it gets right: through Transformers' ordinary path, or
with --weights through this project's in one process, its weights held in that format.

usage: python launch/demo/ask.py [--checkpoint DIR] [--per-kind 200] [--seed 2] [--dtype float32] [--weights int8]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
HELD_OUT_SEED = 2  # train.py draws from seed 1
BATCH = 50  # questions generated at once


@dataclass(frozen=True)
class Asker:
    """A loaded checkpoint and its processor."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path = CHECKPOINT, dtype: str = "float32") -> Asker:
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        return cls(model, AutoProcessor.from_pretrained(folder))

    @classmethod
    def through_adapter(cls, folder: Path, dtype: str, weights: str) -> Asker:
        """The same from adapter.init_inference at tp_size 1, which joins a job of one rank."""
        sys.path.insert(0, str(HERE.parents[1]))
        from adapter import init_inference
        from adapter.config.load import from_dict

        config = {"model": {"path": str(folder), "dtype": dtype}, "tensor_parallel": {"tp_size": 1},
                  "weights": {"format": weights}}
        return cls(init_inference(from_dict(config, Path.cwd())).module, AutoProcessor.from_pretrained(folder))

    def inputs(self, items: Sequence[pictures.Item]) -> Any:
        """Left-padded model inputs for a batch of questions: chat template, image and video processors."""
        texts = [self.processor.apply_chat_template(chat(item), add_generation_prompt=True) for item in items]
        images = [Image.fromarray(picture) for item in items for picture in item.images]
        videos = [[Image.fromarray(frame) for frame in item.frames] for item in items if item.frames]
        media = {"images": images, "videos": videos}
        return self.processor(text=texts, padding=True, return_tensors="pt", **{k: v for k, v in media.items() if v})

    @torch.inference_mode()
    def answer(self, items: Sequence[pictures.Item]) -> list[str]:
        """Greedy answers, one per question."""
        inputs = self.inputs(items)
        tokens = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return list(self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def chat(item: pictures.Item) -> list[dict[str, Any]]:
    """The question as chat messages: pictures or clip first, then the text."""
    media = [{"type": "image"} for _ in item.images] + ([{"type": "video"}] if item.frames else [])
    return [{"role": "user", "content": [*media, {"type": "text", "text": item.prompt}]}]


def accuracy(asker: Asker, per_kind: int, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    """Share of exactly right answers to freshly drawn questions, for each kind."""
    rng = np.random.default_rng(seed)
    shares = {}
    for kind in pictures.KINDS:
        items = [pictures.draw(rng, kind) for _ in range(per_kind)]
        right = 0
        for start in range(0, per_kind, BATCH):
            batch = items[start : start + BATCH]
            right += sum(got == item.answer for got, item in zip(asker.answer(batch), batch, strict=True))
        shares[kind] = right / per_kind
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--per-kind", type=int, default=200)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", choices=("dense", "int8", "int4"), help="through this project, in this format")
    args = parser.parse_args()
    asker = Asker.through_adapter(args.checkpoint, args.dtype, args.weights) if args.weights \
        else Asker.load(args.checkpoint, args.dtype)
    print(json.dumps(accuracy(asker, args.per_kind, args.seed)))


if __name__ == "__main__":
    main()
