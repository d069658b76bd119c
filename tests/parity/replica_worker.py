"""Replicas on four ranks: our grid, and Megatron-style mpus of the caller's. A JSON line of facts from every rank.

    deepspeed --num_accelerators 4 replica_worker.py MODEL_DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
import transformers
from checkpoints import cases
from engine_worker import message
from worker import GREEDY, SAMPLED, inputs_for

import adapter
from adapter.config.load import from_dict

RANK = int(os.environ["RANK"])
CASES = ("image", "video", "text", "two_images")  # one for each replica: a sum over others would be seen


class NewMpu:
    """The names of Megatron-LM today. tp groups 0, 2 and 1, 3: ranks that are no neighbours."""

    def __init__(self) -> None:
        pairs = {"tp": ([0, 2], [1, 3]), "dp": ([0, 1], [2, 3])}
        made = {kind: [torch.distributed.new_group(p) for p in both] for kind, both in pairs.items()}
        self.tp, self.dp = made["tp"][RANK % 2], made["dp"][RANK // 2]

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    def get_tensor_model_parallel_rank(self) -> int:
        return RANK // 2

    def get_data_parallel_group(self) -> Any:
        return self.dp

    def get_data_parallel_rank(self) -> int:
        return RANK % 2

    def get_data_parallel_world_size(self) -> int:
        return 2


class OldMpu:
    """Those of the first Megatron-LM, which DeepSpeed still asks for."""

    def __init__(self, new: NewMpu) -> None:
        self.get_model_parallel_group = new.get_tensor_model_parallel_group
        self.get_model_parallel_rank = new.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = new.get_tensor_model_parallel_world_size
        self.get_data_parallel_group = new.get_data_parallel_group


def load(directory: str) -> Any:
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()


def check(engine: deepspeed.InferenceEngine, plain: Any) -> dict[str, Any]:
    """Compare an engine with one process, each replica with a prompt of its own."""
    mpu = engine.mpu
    replica = mpu.get_data_parallel_rank()
    inputs = inputs_for(cases()[CASES[replica]], "cpu")
    with torch.inference_mode():
        logits = (engine(**inputs).logits - plain(**inputs).logits).abs().max()
        same = torch.equal(engine.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    torch.manual_seed(RANK)
    sampled = engine.generate(**inputs, **SAMPLED).reshape(-1)
    drawn = mpu.tp.all_gather_last(sampled, (sampled.numel(),) * mpu.tp.size).view(mpu.tp.size, -1)
    return {
        "replica": replica, "tp_rank": mpu.get_model_parallel_rank(), "logits": float(logits), "greedy": same,
        "sampled": bool((drawn == drawn[0]).all()), "tp_size": mpu.get_model_parallel_world_size(),
        "tp_ranks": torch.distributed.get_process_group_ranks(mpu.get_model_parallel_group()),
        "dp_ranks": torch.distributed.get_process_group_ranks(mpu.get_data_parallel_group()),
        "shard": sum(p.numel() for p in engine.module.parameters()), "route": mpu.tp.route.name,
    }


def main() -> None:
    directory = next(a for a in sys.argv[1:] if not a.startswith("--"))
    plain = load(directory)
    config = from_dict({"model": {"path": directory, "dtype": "float32"}, "tensor_parallel": {"tp_size": 2}})
    facts = {"ours": check(adapter.init_inference(config), plain)}
    facts["tp1"] = check(adapter.init_inference(model=load(directory), tensor_parallel={"tp_size": 1}), plain)
    new = NewMpu()
    old = OldMpu(new)
    facts["files"] = check(adapter.init_inference(config, mpu=new), plain)
    facts["loaded"] = check(adapter.init_inference(model=load(directory), mpu=old), plain)
    model = load(directory)
    facts["kept_call"] = check(deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, mpu=new)), plain)
    model = load(directory)
    facts["unequal"] = message(adapter.init_inference, model=model, tensor_parallel={"tp_size": 4, "mpu": new})
    facts["no_mpu"] = message(adapter.init_inference, model=model, mpu=object())
    facts["no_replicas"] = message(adapter.init_inference, model=model, tensor_parallel={"tp_size": 3})
    os.write(1, (json.dumps({"rank": RANK, **facts}) + "\n").encode())


if __name__ == "__main__":
    main()
