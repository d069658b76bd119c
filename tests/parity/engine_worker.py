"""What users do with the engine, on the ranks of one job; a JSON line of facts from rank 0.

    [deepspeed --num_accelerators N] engine_worker.py MODEL_DIR
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
from worker import GREEDY, inputs_for

import adapter
from adapter.config.load import from_dict
from policies.errors import UserError

TP = int(os.environ.get("WORLD_SIZE", 1))


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except UserError as error:
        return str(error)
    return "no error"


def config(directory: str, **sections: Any) -> Any:
    return from_dict({"model": {"path": directory, "dtype": "float32"}, "tensor_parallel": {"tp_size": TP}, **sections})


def load(directory: str, dtype: torch.dtype) -> Any:
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=dtype).eval()


def kept_call(directory: str, inputs: Any, expected: torch.Tensor) -> dict[str, Any]:
    """A DeepSpeed script that loads the model itself and keeps the call."""
    model = load(directory, torch.float32)
    whole = sum(p.numel() for p in model.parameters())
    engine = deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, tp_size=TP))
    return {"kept_call": torch.equal(engine.generate(**inputs, **GREEDY), expected),
            "kept_call_share": sum(p.numel() for p in engine.module.parameters()) / whole}


def loaded(model: Any) -> dict[str, Any]:
    """The adapter makes the call, on a loaded model in bfloat16."""
    engine = adapter.init_inference(model=model, tensor_parallel={"tp_size": TP}, max_out_tokens=1000)
    long = torch.full((1, 1001), 20)
    return {"loaded_is_engine": isinstance(engine, deepspeed.InferenceEngine),
            "section_reaches_deepspeed": engine._config.max_out_tokens, "dtype": str(engine.module.dtype),
            "frequencies": sorted({str(b.dtype) for n, b in engine.module.named_buffers() if "inv_freq" in n}),
            "user_limit": message(engine.generate, long, max_new_tokens=1)}


def from_files(directory: str, inputs: Any, logits: torch.Tensor) -> dict[str, Any]:
    """From the YAML: forward, streaming, a prompt past DeepSpeed's default limit of 1024."""
    facts: dict[str, Any] = {}
    engine = adapter.init_inference(config(directory))
    with torch.inference_mode():
        facts["forward"] = float((engine(**inputs).logits - logits)[inputs["attention_mask"].bool()].abs().max())
    seen: list[torch.Tensor] = []
    streamer = type("Streamer", (transformers.generation.streamers.BaseStreamer,),
                    {"put": lambda self, v: seen.append(v.reshape(-1)), "end": lambda self: None})()
    tokens = engine.generate(**inputs_for(cases()["text"], "cpu"), **GREEDY, streamer=streamer)
    facts["streamed"] = torch.equal(torch.cat(seen), tokens.reshape(-1))
    long = {"input_ids": torch.full((1, 1500), 20), "attention_mask": torch.ones(1, 1500, dtype=torch.int64)}
    facts["long_prompt"] = list(engine.generate(**long, max_new_tokens=2, min_new_tokens=2).shape)
    facts["out_of_vocabulary"] = False
    try:
        engine(input_ids=torch.tensor([[10 ** 6]]))
    except IndexError as error:
        facts["out_of_vocabulary"] = "vocabulary" in str(error)
    return facts


def refusals(directory: str, model: Any) -> dict[str, Any]:
    """What init_inference refuses, in its words."""
    own = {"dtype": "bf16", "tensor_parallel": {"tp_size": 2}, "replace_with_kernel_inject": True, "checkpoint": "x"}
    call = adapter.init_inference
    other = type("M", (torch.nn.Linear,), {"config": transformers.BertConfig()})(2, 2)
    return {"own_keys": {k: message(call, config(directory, deepspeed={k: v})) for k, v in own.items()},
            "stray": message(call, config(directory), max_out_tokens=7),
            "odd_section": message(call, model=model, tensor_parallel={"size": 4}),
            "both": message(call, "x.yaml", model=model), "neither": message(call),
            "not_a_model": message(call, model=torch.nn.Linear(2, 2)),
            "other_family": message(call, model=other, tensor_parallel={"tp_size": TP})}


def main() -> None:
    directory = next(a for a in sys.argv[1:] if not a.startswith("--"))
    inputs = inputs_for(cases()["batch"], "cpu")
    plain = load(directory, torch.float32)
    with torch.inference_mode():
        expected, logits = plain.generate(**inputs, **GREEDY), plain(**inputs).logits
    facts = kept_call(directory, inputs, expected)
    model = load(directory, torch.bfloat16)
    facts |= loaded(model) | from_files(directory, inputs, logits) | refusals(directory, model)
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(1, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    main()
