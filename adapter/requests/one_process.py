"""Answer the same requests in one process with Transformers alone: no DeepSpeed, no sharding, no layer of ours.

Every tensor-parallel answer is compared with these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from adapter.checkpoint.lora import MergedCheckpoint
from adapter.checkpoint.plain import read_plain
from adapter.checkpoint.quantised import form_of
from adapter.checkpoint.safetensors import Checkpoint, read_config
from adapter.checkpoint.sharded import is_sharded
from adapter.config.release import class_of, dense_config
from adapter.config.schema import Config, Model
from adapter.parallel.group import to_device
from adapter.planning.load import checked_plan
from adapter.requests.batching import Clock, Generated, Limits, Write, generate
from adapter.requests.finite import finite_generate
from adapter.requests.results import Answers
from adapter.requests.runner import Tally, answer, make_processor
from policies.errors import UserError
from policies.policy import Policy
from policies.registry import policy_for
from policies.rules import TensorSlice


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
    _merge_adapters(model, directory, config.model, policy)
    limits = Limits.of(config, context, model.generation_config)

    own = finite_generate(model)

    def run(inputs: dict[str, Tensor], clock: Clock) -> Generated:
        with torch.inference_mode():
            return generate(inputs, own, limits, clock)

    tally = answer(config, processor, limits, run, answers)
    write(tally.summary(config, 1, began))
    return tally


def _merge_adapters(model: Any, directory: Path, stated: Model, policy: Policy) -> None:
    """Put the weights that adapters update into `model`, as the ranks read them. Raises UserError."""
    if not stated.adapters:
        return
    _, checkpoint = checked_plan(directory, 1, stated.dtype, adapters=stated.adapters)
    assert isinstance(checkpoint, MergedCheckpoint)
    updated = {name for adapter in checkpoint.adapters for name in adapter.updates}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (published := policy.published(name)) in updated:
                parameter.copy_(checkpoint.read(published, TensorSlice(tuple(parameter.shape))))
                updated.remove(published)
    assert not updated, f"the model has no {updated}"


def _load(directory: Path, stated: Model, policy: Policy) -> Any:
    """Load the whole model. Raises UserError where Transformers refuses the attention implementation."""
    options = {"torch_dtype": stated.torch_dtype, "attn_implementation": stated.attn_implementation}
    try:
        if form_of(read_config(directory)) is not None:
            model = _decoded(directory, stated, policy, options)
        else:
            model = class_of(policy).from_pretrained(directory, local_files_only=True, use_safetensors=True, **options)
    except ImportError as error:
        raise UserError(f"model.attn_implementation = {stated.attn_implementation}: {error}") from None
    return model.eval().to(to_device(torch.empty(0)).device)


def _decoded(directory: Path, stated: Model, policy: Policy, options: Mapping[str, Any]) -> Any:
    """A model with quantised weights decoded to model.dtype. Transformers itself reads most of them on GPUs alone, with
    packages of their own, and computes in other formats than ranks do."""
    plan, checkpoint = checked_plan(directory, 1, stated.dtype)
    assert isinstance(checkpoint, Checkpoint)
    names = [f"{module}.{suffix}" for module, suffix in plan.parameters()]
    config = dense_config(directory)
    model = class_of(policy).from_pretrained(
        None, config=config, state_dict={n: read_plain(checkpoint, n).to(stated.torch_dtype) for n in names}, **options)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model
