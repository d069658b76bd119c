"""What a script may hand over: a model it loaded, and arguments of its DeepSpeed call. Checked before ranks join."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from adapter.config.release import class_of
from adapter.model import layers
from adapter.parallel.group import Group, to_device
from policies.errors import UserError, shortened
from policies.policy import Geometry, Policy

SHARDED = (layers.ColumnParallelLinear, layers.RowParallelLinear, layers.VocabParallelEmbedding,
           layers.VocabParallelHead)

SIZE = "write deepspeed_kwargs(model, tp_size=N) or init_inference(model=..., tensor_parallel={'tp_size': N})"
KERNELS = "leave it out, kernel injection and this policy exclude each other"
# arguments that scripts have in their call and that the adapter does not take -> what to do instead
ARGUMENTS = {
    "mp_size": SIZE, "tp_size": SIZE, "tp": SIZE, "tensor_parallel": SIZE,
    "dtype": "leave it out, the engine computes in the dtype the model was loaded in: from_pretrained(torch_dtype=...)",
    "replace_with_kernel_inject": KERNELS, "kernel_inject": KERNELS,
    "checkpoint": "leave it out, the weights are the model's own",
    "config": "write its keys as arguments",
}


def check_arguments(section: Mapping[str, Any]) -> None:
    """Raises UserError for an argument that a script's call had and that must go, with what to write instead."""
    for name in section.keys() & ARGUMENTS.keys():
        if section[name] is not False:  # an off switch does no harm
            raise UserError(f"{name}={section[name]!r}: {ARGUMENTS[name]}")


def check_loaded(model: nn.Module, policy: Policy, geometry: Geometry) -> None:
    """Raises UserError where shards of `model` would not compute what it does: what it is, and what to do."""
    _check_class(model, policy)
    name, modules = type(model).__name__, dict(model.named_modules())
    if any(isinstance(module, SHARDED) for module in modules.values()):
        raise UserError(f"this {name} is a rank's shard already: one call makes it one, in place. Use the engine of "
                        "that call, or load the model again")
    if any(module.endswith(".base_layer") for module in modules):
        raise UserError(f"this {name} has adapters (LoRA) in it; merge them into its weights first: "
                        "model = peft_model.merge_and_unload()")
    tensors = {policy.published(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in tensors.values()):
        raise UserError(f"this {name} is quantised, and a quantised model in memory cannot be sharded: load it without "
                        "quantization_config, or let adapter.init_inference(config) read AWQ, GPTQ or FP8 files")
    if empty := [n for n, p in tensors.items() if p.is_meta]:
        raise UserError(f"{len(empty)} parameters have no values (they are on `meta`), {empty[0]} is one: load the "
                        "model with from_pretrained and without device_map, or let adapter.init_inference(config) load "
                        "it, which reads only a rank's own slices")
    if any(hasattr(module, "_hf_hook") for module in modules.values()):
        raise UserError("device_map has spread this model over devices, with hooks that move its inputs; load it "
                        "without device_map: each rank puts its shard on its own device")
    _check_shapes(tensors, policy, geometry)
    _check_tie(tensors, policy, geometry)
    _check_flash(str(getattr(model.config, "_attn_implementation", "")), tensors[policy.tied[1]].dtype)


def prompt_of(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids, int64 [B, S], among the arguments of a `generate`; None where there are none."""
    ids: Tensor | None = kwargs.get("input_ids", kwargs.get("inputs", inputs[0] if inputs else None))
    return ids


def checked_prompt(generate: Callable[..., Any], vocab: int, tp: Group) -> Callable[..., Any]:
    """`generate` for prompts of token ids below `vocab`; raises OutOfVocabulary on every rank for others."""
    def checked(*inputs: Any, **kwargs: Any) -> Any:
        if (ids := prompt_of(inputs, kwargs)) is not None:
            check_prompt(ids, vocab, tp)
        return generate(*inputs, **kwargs)

    checked.__wrapped__ = generate  # type: ignore[attr-defined]
    return checked


def check_prompt(ids: Tensor, vocab: int, tp: Group) -> None:
    """Raises OutOfVocabulary on every rank where a token id, int64 [B, S], of some rank is none of the vocabulary.

    Once for each `generate`, for one all-gather of two numbers and, on a GPU, one synchronisation.
    """
    every = tp.all_gather_last(to_device(layers.ids_range(ids)), (2,) * tp.size)
    for rank, found in enumerate(every.view(-1, 2).tolist()):
        layers.refuse_unknown(found, vocab, rank if tp.size > 1 else None)


def _check_class(model: nn.Module, policy: Policy) -> None:
    name = type(model).__name__
    if isinstance(model, deepspeed.InferenceEngine):
        raise UserError("this is an engine already; init_inference and deepspeed_kwargs take the model itself, once")
    if hasattr(model, "merge_and_unload"):
        raise UserError(f"{name}: merge its adapters into the weights first: model = model.merge_and_unload()")
    if not isinstance(model, class_of(policy)):
        raise UserError(f"{name} is not a {policy.model_class}; pass what {policy.model_class}.from_pretrained "
                        "returned, whole, and before anything wraps it (torch.compile, DataParallel)")


def _check_shapes(tensors: Mapping[str, Tensor], policy: Policy, geometry: Geometry) -> None:
    """A config that was edited after loading would cut other tensors than there are."""
    wrong = [f"{n} has {list(tensors[n].shape)}, its config says {list(shape)}"
             for n, shape in policy.inventory(geometry).items() if n in tensors and tensors[n].shape != shape]
    if wrong:
        raise UserError("the model and its config do not agree:\n  " + "\n  ".join(shortened(wrong)))


def _check_tie(tensors: Mapping[str, Tensor], policy: Policy, geometry: Geometry) -> None:
    """Shards follow the config; a head that was given weights of its own would be lost."""
    head, embedding = policy.tied
    if geometry.tied and head in tensors and not torch.equal(tensors[head], tensors[embedding]):
        raise UserError(f"config.tie_word_embeddings is true, but {head} differs from {embedding}; set "
                        "model.config.tie_word_embeddings = False to keep both, or call model.tie_weights()")


def _check_flash(attention: str, dtype: torch.dtype) -> None:
    """Transformers would look for a torch.nn.Linear to take a dtype from, and a shard has none."""
    if "flash" in attention and dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{attention} computes in bfloat16 and float16 only, and this model is {dtype}; load it with "
                        "torch_dtype=torch.bfloat16, or with attn_implementation sdpa")
