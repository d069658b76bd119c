"""One rank of stock DeepSpeed and stock Transformers, given what to cut by policies/dialects.py. No code of adapter/.

    deepspeed --num_accelerators N stock_worker.py --out DIR MODEL_DIR [MODEL_DIR ...]

Each model under each dialect that does not refuse: rank 0 writes its logits, and for partition_config the loss and some
gradients of one training step; every rank writes the shapes of its parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
from checkpoints import cases
from safetensors.torch import save_file
from transformers import Qwen2VLForConditionalGeneration

from policies.errors import UserError
from policies.export import DIALECTS
from policies.policy import Policy
from policies.registry import policy_for

TP, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
CASES = ("text", "image", "video", "batch")
TRAINED = ("visual.patch_embed.proj.weight", "visual.blocks.0.norm1.bias", "model.embed_tokens.weight")


def loaded(directory: Path, **kwargs: Any) -> torch.nn.Module:
    return Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()


def by_injection_policy(directory: Path, policy: Policy, words: dict[str, Any]) -> torch.nn.Module:
    model = loaded(directory)
    modules = {policy.published(name): module for name, module in model.named_modules()}
    classes = {type(modules[f"{stack}.0"]): tuple(rows) for stack, rows in words.items()}
    return deepspeed.init_inference(model, dtype=torch.float32, injection_policy=classes,
                                    tensor_parallel={"tp_size": TP})


def by_partition_config(directory: Path, policy: Policy, words: dict[str, Any]) -> torch.nn.Module:
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": words}
    model = loaded(directory)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    engine.eval()
    return engine


def by_tp_plan(directory: Path, policy: Policy, words: dict[str, Any]) -> torch.nn.Module:
    from transformers.distributed import DistributedConfig

    return loaded(directory, distributed_config=DistributedConfig(tp_size=TP, tp_plan=words))


CONSUMERS = {"tp_plan": by_tp_plan, "injection_policy": by_injection_policy, "partition_config": by_partition_config}


def logits(model: torch.nn.Module, vocab: int) -> dict[str, torch.Tensor]:
    out = {}
    for name in CASES:
        inputs = cases(vocab)[name]
        with torch.no_grad():
            out[name] = model(**inputs).logits[inputs["attention_mask"].bool()].contiguous()
    return out


def training_step(model: torch.nn.Module, policy: Policy, vocab: int, backward: Any) -> dict[str, torch.Tensor]:
    """The loss of one step, and gradients of parameters that are whole on every rank, early in both encoders."""
    inputs = cases(vocab)["image"]
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    backward(loss)
    named = {policy.published(name): p for name, p in model.named_parameters() if p.grad is not None}
    named = {name.removeprefix("module."): p for name, p in named.items()}
    return {"loss": loss.detach()} | {name: named[name].grad.clone() for name in TRAINED}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--local_rank", type=int)
    p.add_argument("models", nargs="+", type=Path)
    args = p.parse_args()
    for dialect, consumer in CONSUMERS.items():
        for directory in args.models:
            config = json.loads((directory / "config.json").read_text())
            policy = policy_for(config)
            geometry = policy.geometry(config)
            try:
                words = DIALECTS[dialect](policy, geometry, TP).words
            except UserError:
                continue
            model = consumer(directory, policy, json.loads(json.dumps(words)))
            name = f"{directory.name}.{dialect}.tp{TP}"
            results = logits(model, geometry.sizes["vocab"])
            module = getattr(model, "module", model)
            shapes = {policy.published(name): tuple(getattr(p, "to_local", lambda p=p: p)().shape)
                      for name, p in module.named_parameters(remove_duplicate=False)}
            if dialect == "partition_config":
                results |= training_step(module, policy, geometry.sizes["vocab"], model.backward)
            (args.out / f"{name}.rank{RANK}.json").write_text(json.dumps(shapes))
            if RANK == 0:
                save_file(results, args.out / f"{name}.safetensors")


def clean_up() -> None:
    """Stock DeepSpeed leaves its 69 MB of shared memory behind."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{host}_{port}_{RANK}").unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    finally:
        clean_up()
