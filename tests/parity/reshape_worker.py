"""One rank of the original failure: hidden 3584, 28 heads, 359 tokens, without the per-rank head override and with it.

    deepspeed --num_accelerators 4 reshape_worker.py MODEL_DIR OUT.safetensors      what fails goes to stderr
    python reshape_worker.py --plain MODEL_DIR OUT.safetensors                      one process, plain Transformers
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from safetensors.torch import save_file

from adapter.checkpoint.safetensors import Checkpoint
from adapter.model.inject import checkpoint_source, inject
from adapter.model.meta_init import build_on_meta
from adapter.parallel import parallel_state
from adapter.parallel.group import Group
from adapter.planning.load import checked_plan
from adapter.planning.plan import Plan

TOKENS = 359


def prompt(vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def shard(directory: Path, plan: Plan, tp: Group, checkpoint: Checkpoint) -> torch.nn.Module:
    model = build_on_meta(directory, plan.policy, torch.float32, "sdpa")
    inject(model, plan, tp, checkpoint_source(checkpoint, tp.rank), torch.float32)
    return model


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--plain", action="store_true")
    p.add_argument("--local_rank", type=int)
    args = p.parse_args()
    if args.plain:
        plain = transformers.Qwen2VLForConditionalGeneration
        model = plain.from_pretrained(args.model, torch_dtype=torch.float32).eval()
    else:
        tp_size = int(os.environ["WORLD_SIZE"])
        plan, checkpoint = checked_plan(args.model, tp_size, "float32")
        tp = parallel_state.start(tp_size).tp
        without = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, head_numbers=()))
        try:
            with torch.inference_mode():
                shard(args.model, without, tp, checkpoint)(**prompt(plan.geometry.sizes["vocab"]))
        except RuntimeError as error:
            print(f"without the override: {error}", file=sys.stderr, flush=True)
        model = shard(args.model, plan, tp, checkpoint)
    with torch.inference_mode():
        logits = model(**prompt(model.config.get_text_config().vocab_size)).logits
    if int(os.environ.get("RANK", 0)) == 0:
        save_file({"logits": logits.contiguous()}, args.out)


if __name__ == "__main__":
    main()
