"""Time Transformers' own model and loop: in one process (hf), under its own tensor parallelism (hf-tp, by torchrun), or
cut by stock DeepSpeed (deepspeed, by its launcher), where every rank loads the whole model first.

JSON lines of rank 0: ready, when all ranks are, then what was timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peer import ENDLESS, WARM_UP_TOKENS, arguments, json_lines, speed
from safetensors.torch import load_file
from transformers.generation.streamers import BaseStreamer

Model = Any
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Clock(BaseStreamer):
    """When each token came; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(path: str, dtype: torch.dtype, **more: Any) -> Model:
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model_class = transformers.AutoModelForImageTextToText
    return model_class.from_pretrained(path, local_files_only=True, **{name: dtype}, **more)


def one_process(path: str, dtype: torch.dtype) -> Model:
    return load(path, dtype).to("cuda" if torch.cuda.is_available() else "cpu")


def own_tensor_parallel(path: str, dtype: torch.dtype) -> Model:
    from transformers.distributed import DistributedConfig

    return load(path, dtype, distributed_config=DistributedConfig(tp_size=WORLD, tp_plan="auto"))


def stock_deepspeed(path: str, dtype: torch.dtype) -> Model:
    """The text encoder cut; DeepSpeed would compute wrong numbers with the vision encoder's layers."""
    import deepspeed

    from policies.export import injection_policy
    from policies.registry import policy_for

    deepspeed.init_distributed()
    model = load(path, dtype)
    config = model.config.to_dict()
    policy = policy_for(config, path)
    stacks = injection_policy(policy, policy.geometry(config), WORLD).words
    modules = {policy.published(name): module for name, module in model.named_modules()}
    by_class = {type(modules[f"{stack}.0"]): rows for stack, rows in stacks.items()}
    return deepspeed.init_inference(model, tensor_parallel={"tp_size": WORLD}, dtype=dtype,
                                    injection_policy=by_class).module


LOADERS: dict[str, Callable[[str, torch.dtype], Model]] = {
    "hf": one_process, "hf-tp": own_tensor_parallel, "deepspeed": stock_deepspeed}


def wait() -> None:
    """Wait for the other ranks."""
    if WORLD > 1:
        torch.distributed.barrier()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--engine", choices=list(LOADERS), required=True)
    args, write = parser.parse_args(), json_lines()
    began = time.perf_counter()
    model = LOADERS[args.engine](args.model, getattr(torch, args.dtype)).eval()
    load_s = time.perf_counter() - began
    inputs = {name: tensor.to(model.device) for name, tensor in load_file(args.inputs).items()
              if not name.startswith("image.")}

    def run(new: int) -> dict[str, float]:
        wait()
        clock, began = Clock(), time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=1, **ENDLESS,
                           streamer=clock)
        return speed(began, clock.times[1:])

    wait()
    if RANK == 0:
        write({"ready": True})
    cold = run(WARM_UP_TOKENS)
    row = {"load_s": round(load_s, 4), "cold_ttft_s": cold["ttft_s"], **run(args.new),
           "case": {"version": transformers.__version__, "prompt_tokens": inputs["input_ids"].shape[1],
                    "threads": torch.get_num_threads()}}
    if RANK == 0:
        write(row)
    wait()
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
