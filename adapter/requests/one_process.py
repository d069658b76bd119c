"""Answer the same requests in one process with Transformers alone: no DeepSpeed, no sharding, no layer of ours.

Every tensor-parallel answer is compared with these.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter.checkpoint.safetensors import read_config
from adapter.checkpoint.sharded import is_sharded
from adapter.config.release import class_of
from adapter.config.schema import Config, Model
from adapter.parallel.group import to_device
from adapter.requests.batching import Clock, Generated, Limits, Write, generate
from adapter.requests.finite import finite_generate
from adapter.requests.results import Answers
from adapter.requests.runner import Tally, answer, make_processor
from policies.errors import UserError
from policies.policy import Policy
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
    model = _load(directory, config.model, policy)
    limits = Limits.of(config, context, model.generation_config)

    own = finite_generate(model)

    def run(inputs: dict[str, Tensor], clock: Clock) -> Generated:
        with torch.inference_mode():
            return generate(inputs, own, limits, clock)

    tally = answer(config, processor, limits, run, answers)
    write(tally.summary(config, 1, began))
    return tally


def _load(directory: Path, stated: Model, policy: Policy) -> Any:
    """Load the whole model. Raises UserError where Transformers refuses the attention implementation."""
    try:
        model = class_of(policy).from_pretrained(
            directory, torch_dtype=stated.torch_dtype, attn_implementation=stated.attn_implementation,
            local_files_only=True, use_safetensors=True)
    except ImportError as error:
        raise UserError(f"model.attn_implementation = {stated.attn_implementation}: {error}") from None
    return model.eval().to(to_device(torch.empty(0)).device)
