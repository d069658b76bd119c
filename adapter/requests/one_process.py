"""Answer the same requests in one process with Transformers alone: no DeepSpeed, no sharding, no layer of ours.

Every tensor-parallel answer is compared with these.
"""

from __future__ import annotations

import time

import torch
import transformers
from torch import Tensor

from adapter.checkpoint.safetensors import read_config
from adapter.checkpoint.sharded import is_sharded
from adapter.config.schema import Config
from adapter.parallel.group import to_device
from adapter.requests.batching import Clock, Limits, Write, generate
from adapter.requests.results import Answers
from adapter.requests.runner import Tally, answer, make_processor
from policies.errors import UserError
from policies.registry import policy_for


def answer_in_one_process(config: Config, answers: Answers, write: Write) -> Tally:
    """Answer every request of the config; `answers` get a row per request, `write` the summary."""
    began = time.perf_counter()
    directory = config.weights.original or config.model.path
    if is_sharded(directory):
        raise UserError(f"{directory}: holds the shards of ranks; for one process set weights.original to the "
                        "directory of the model that they were made from")
    mapping = read_config(directory)
    policy = policy_for(mapping)
    context = policy.geometry(mapping).context
    processor = make_processor(config, context)
    model = getattr(transformers, policy.model_class).from_pretrained(
        directory, torch_dtype=config.model.torch_dtype, attn_implementation=config.model.attn_implementation,
        local_files_only=True, use_safetensors=True,
    ).eval()
    model.to(to_device(torch.empty(0)).device)
    limits = Limits.of(config, context, model.generation_config)

    def run(inputs: dict[str, Tensor], clock: Clock) -> Tensor:
        with torch.inference_mode():
            return generate(inputs, model.generate, limits, clock)

    tally = answer(config, processor, limits, run, answers)
    write(tally.summary(config, 1, began))
    return tally
