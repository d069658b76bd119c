"""Train the demo checkpoint: a small Qwen2-VL that answers questions about drawn shapes.

usage: python launch/demo/train.py [--out launch/demo/checkpoint] [--steps N] [--seed 1] [--device cpu]

Draws its own pictures, trains from nothing, rounds the weights to bfloat16, writes the checkpoint and measures it on
held-out pictures. Progress goes to stderr, the accuracies to stdout and to accuracy.json beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import side_files
import torch
from ask import CHECKPOINT, HELD_OUT_SEED, Asker, accuracy, chat
from safetensors.torch import save_file
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

Batch = dict[str, torch.Tensor]

PATCH, MERGE, TEMPORAL = 14, 2, 2
PER_KIND = 200  # held-out questions of each kind
PUBLISHED = {"model.visual.": "visual.", "model.language_model.": "model."}  # names since 4.52 -> as published


@dataclass(frozen=True)
class Stage:
    """One stage of training: optimiser steps, pictures a step, peak learning rate and the steps it takes to reach."""

    name: str
    steps: int
    questions: int
    rate: float
    warmup: int


SEE = Stage("see", steps=800, questions=48, rate=2e-3, warmup=30)
ANSWER = Stage("answer", steps=550, questions=48, rate=1e-3, warmup=50)
LAYOUTS = (  # kinds that share a batch, the harder ones repeated, and questions a step; shapes differ between rows
    (("colour", "shape", "place", "count", "count"), 32),
    (("more",), 10),
    (("motion",), 6),
)


def patches(pairs: Sequence[tuple[pictures.Picture, ...]], processor: Any) -> torch.Tensor:
    """Pairs of uint8 frames [SIDE, SIDE, 3] -> float32 [pairs * 64, 3 * 2 * 14 * 14], as the processor does it."""
    mean = torch.tensor(processor.image_processor.image_mean) * 255
    std = torch.tensor(processor.image_processor.image_std) * 255
    pixels = (torch.from_numpy(np.array(pairs)).float() - mean) / std
    side = pictures.SIDE // PATCH // MERGE
    grid = pixels.reshape(len(pairs), TEMPORAL, side, MERGE, PATCH, side, MERGE, PATCH, 3)
    # patches in blocks of 2 x 2, each patch as channel, frame, row, column
    return grid.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * TEMPORAL * PATCH * PATCH)


@dataclass(frozen=True)
class Collator:
    """Questions of one layout -> the model's training inputs, right-padded, with loss on the answers alone.

    The processor would give the same inputs (see `check`), some ten times slower.
    """

    processor: Any

    def __call__(self, items: Sequence[pictures.Item]) -> Batch:
        cells = pictures.SIDE // PATCH
        if items[0].frames:
            pairs = [item.frames[i : i + TEMPORAL] for item in items for i in range(0, len(item.frames), TEMPORAL)]
            grid = [[len(item.frames) // TEMPORAL, cells, cells] for item in items]
            names, token, kind = ("pixel_values_videos", "video_grid_thw"), "<|video_pad|>", 2
        else:
            pairs = [(picture,) * TEMPORAL for item in items for picture in item.images]
            grid = [[1, cells, cells] for _ in pairs]
            names, token, kind = ("pixel_values", "image_grid_thw"), "<|image_pad|>", 1
        media = dict(zip(names, (patches(pairs, self.processor), torch.tensor(grid)), strict=True))
        text = self._text(items, token)
        is_media = text["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids(token)
        return media | text | {"mm_token_type_ids": is_media.long() * kind}

    def _text(self, items: Sequence[pictures.Item], token: str) -> Batch:
        """Token ids and labels, int64 [items, longest]."""
        tokenizer, cells = self.processor.tokenizer, (pictures.SIDE // PATCH // MERGE) ** 2
        rows, labels = [], []
        for item in items:
            prompt = self.processor.apply_chat_template(chat(item), add_generation_prompt=True)
            count = cells * max(1, len(item.frames) // TEMPORAL)
            question = tokenizer(prompt.replace(token, token * count))["input_ids"]
            answer = tokenizer(item.answer + "<|im_end|>")["input_ids"]
            rows.append(torch.tensor(question + answer))
            labels.append(torch.tensor([-100] * len(question) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }


def check(collator: Collator, asker: Asker) -> None:
    """Assert that training sees what the ordinary path will see."""
    rng = np.random.default_rng(0)
    for kind in pictures.KINDS:
        item = pictures.draw(rng, kind)
        ours, theirs = collator([item]), asker.inputs([item])
        length = theirs["input_ids"].shape[1]
        for name, value in theirs.items():
            if name != "attention_mask":
                mine = ours[name][:, :length] if value.shape[0] == 1 and value.dtype == torch.int64 else ours[name]
                torch.testing.assert_close(mine[..., : value.shape[-1]], value, rtol=0, atol=1e-5)


def build(folder: Path, seed: int) -> Any:
    """A fresh model with the checkpoint's configuration, in float32."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig.from_pretrained(folder)
    # eager attention: for heads this narrow its backward pass is several times faster than sdpa's
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    # The usual 0.02 suits wide models; at this width pictures would go unnoticed for hundreds of steps.
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "lm_head" not in name:
            torch.nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    return model


def optimise(
    parameters: Sequence[torch.nn.Parameter], losses: Callable[[], Iterator[torch.Tensor]], stage: Stage
) -> None:
    """AdamW over `stage.steps` steps, each the sum of the losses; linear warm-up, then a cosine down to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return min((step + 1) / stage.warmup, 0.5 * (1 + math.cos(math.pi * step / stage.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    start, shown = time.monotonic(), []
    for step in range(1, stage.steps + 1):
        values = []
        for loss in losses():
            loss.backward()
            values.append(loss.item())
        shown.append(values)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            means = "  ".join(f"{mean:.3f}" for mean in np.mean(shown, axis=0))
            elapsed = time.monotonic() - start
            print(f"{stage.name} {step}/{stage.steps}  {elapsed:.0f} s  loss {means}", file=sys.stderr, flush=True)
            shown.clear()


def see(model: Any, processor: Any, seed: int, device: str) -> None:
    """Stage one, the vision encoder alone, through linear heads that are thrown away.

    One head names what each cell of a picture holds; the other reads the facts about the whole picture off the mean of
    its tokens, so that the language model finds them wherever it happens to look first.
    """
    rng = np.random.default_rng(seed)
    encoder = model.model.visual
    sizes = [len(options) for options in pictures.FACTS]
    hidden = model.config.text_config.hidden_size
    heads = torch.nn.ModuleList([torch.nn.Linear(hidden, pictures.CODES), torch.nn.Linear(hidden, sum(sizes))])
    heads.to(device)
    side = pictures.SIDE // PATCH
    grid = torch.tensor([[1, side, side]] * SEE.questions, device=device)

    def losses() -> Iterator[torch.Tensor]:
        drawn = [pictures.labelled(rng) for _ in range(SEE.questions)]
        pixels = patches([(item.picture,) * TEMPORAL for item in drawn], processor).to(device)
        cells = torch.from_numpy(np.stack([item.cells for item in drawn])).to(device)
        facts = torch.tensor([item.facts for item in drawn], device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            tokens = encoder(pixels, grid_thw=grid).pooler_output.reshape(*cells.shape, hidden)
            codes, whole = heads[0](tokens), heads[1](tokens.mean(1))
        entropy = torch.nn.functional.cross_entropy
        about = [entropy(part.float(), fact) for part, fact in zip(whole.split(sizes, -1), facts.T, strict=True)]
        yield entropy(codes.float().flatten(0, 1), cells.flatten()) + torch.stack(about).mean()

    optimise([*encoder.parameters(), *heads.parameters()], losses, SEE)


def answer(model: Any, collator: Collator, seed: int, device: str) -> None:
    """Stage two, the whole model: answer questions, one batch of every layout a step."""
    rng = np.random.default_rng(seed)

    def losses() -> Iterator[torch.Tensor]:
        for kinds, count in LAYOUTS:
            items = [pictures.draw(rng, kinds[int(rng.integers(len(kinds)))]) for _ in range(count)]
            batch = {name: value.to(device) for name, value in collator(items).items()}
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            yield loss

    optimise(list(model.parameters()), losses, ANSWER)


def save(model: Any, folder: Path) -> int:
    """Write the weights in bfloat16 under their published names; returns how many there are."""
    tensors = {}
    for name, value in model.state_dict().items():
        for ours, published in PUBLISHED.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
        tensors[name] = value.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=1, help=f"anything but {HELD_OUT_SEED}, the held-out one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    start = time.monotonic()
    side_files.write(args.out)
    processor = AutoProcessor.from_pretrained(args.out)
    collator, model = Collator(processor), build(args.out, args.seed)
    check(collator, Asker(model, processor))
    model.to(args.device).train()
    see(model, processor, args.seed, args.device)
    answer(model, collator, args.seed, args.device)
    parameters = save(model, args.out)
    minutes = round((time.monotonic() - start) / 60, 1)
    shares = accuracy(Asker.load(args.out), PER_KIND)
    report = {
        "accuracy": shares,
        "questions_per_kind": PER_KIND,
        "held_out_seed": HELD_OUT_SEED,
        "parameters": parameters,
        "training_minutes": minutes,
    }
    (args.out / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
