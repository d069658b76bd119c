"""`init_inference`: a config or a loaded model -> a deepspeed.InferenceEngine over this rank's shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.config import DeepSpeedInferenceConfig
from pydantic import ValidationError
from torch import nn

from adapter.config.hub import shown
from adapter.config.load import load_config
from adapter.config.schema import Config, TensorParallelSection
from adapter.generation import cuda_graph
from adapter.generation.loop import DecodeLoop
from adapter.health.desync import checked_generate
from adapter.health.job_facts import facts_of_config, facts_of_model
from adapter.health.self_test import self_test, skeletons
from adapter.kernels import linear as kernels
from adapter.model.checks import check_arguments, check_loaded, checked_prompt, prompt_of
from adapter.model.inject import checkpoint_source, inject, model_source
from adapter.model.meta_init import build_on_meta
from adapter.model.published import PublishedModules
from adapter.parallel import parallel_state
from adapter.parallel.launchers import read_environment
from adapter.parallel.parallel_state import Mpu
from adapter.planning.load import checked_plan, note_of_defaults, note_of_form, require, stated
from adapter.planning.plan import Plan
from adapter.requests.finite import finite_generate
from policies.errors import UserError
from policies.export import row_parallel
from policies.policy import Policy
from policies.registry import policy_for

log = logging.getLogger("adapter")

# deepspeed.init_inference arguments that the adapter sets itself -> what to use instead
OWN_KEYS = {
    "dtype": "model.dtype", "tensor_parallel": "tensor_parallel.tp_size", "tp": "tensor_parallel.tp_size",
    "mp_size": "tensor_parallel.tp_size", "mpu": "init_inference(..., mpu=...)", "checkpoint": "model.path",
    **dict.fromkeys(("injection_policy", "injection_policy_tuple", "injection_dict"), "a policy page in policies/"),
    "config": "the deepspeed section itself",
    "replace_with_kernel_inject": "nothing: kernel injection and this policy exclude each other",
    "kernel_inject": "nothing: kernel injection and this policy exclude each other",
}
LIMITS = {"max_out_tokens", "max_tokens"}  # DeepSpeed's two names of one thing


@dataclass(frozen=True)
class LoadReport:
    """What this rank did to get its shard: bytes read from files, bytes held, seconds."""

    bytes_read: int
    weight_bytes: int
    seconds: float


def init_inference(
    config: str | Path | Config | None = None,
    *,
    overrides: tuple[str, ...] = (),
    model: nn.Module | None = None,
    tensor_parallel: Mapping[str, Any] | None = None,
    mpu: Any = None,
    **deepspeed_section: Any,
) -> deepspeed.InferenceEngine:
    """A real deepspeed.InferenceEngine whose module is this rank's shard of both encoders.

    Either `config` (a YAML file or a Config; `overrides` as on the command line), or `model`, a Transformers model the
    caller loaded on every rank, with `tensor_parallel={"tp_size": N}` (the keys of the YAML's section) and any argument
    of deepspeed.init_inference. `mpu` is a Megatron-style one the caller has; without it the ranks of the job make as
    many replicas of tp_size as they can. Every rank must call it. The engine has three more attributes: `plan`,
    `load_report` and `mpu`, the groups (adapter.parallel.parallel_state.Mpu).

    Raises UserError for anything a user can cause: a bad config, a tp_size the model or the job cannot have, a
    checkpoint with missing, extra, truncated or misshapen tensors. Raises CheckFailed where the shards, once loaded, do
    not compute what one process does (off with tensor_parallel.self_test: false).
    """
    if isinstance(config, nn.Module):
        raise UserError("init_inference takes a config first; give a loaded model by name: init_inference(model=...)")
    if (config is None) == (model is None):
        raise UserError("init_inference takes either a config or model=..., and exactly one of them")
    if model is not None:
        check_arguments(deepspeed_section)
        _check_section(deepspeed_section)
        shard = _shard_loaded(model, *_parallel(tensor_parallel, mpu), deepspeed_section)
        return _start_engine(shard, deepspeed_section)
    if stray := [*deepspeed_section, *(["tensor_parallel"] if tensor_parallel else [])]:
        raise UserError(f"init_inference with a config takes {', '.join(stray)} from it; use overrides=('key=value',)")
    if isinstance(config, (str, Path)):
        config = load_config(config, overrides)
    assert config is not None
    return _start_engine(_shard_from_files(config, mpu), config.deepspeed)


def deepspeed_kwargs(model: nn.Module, tp_size: int | None = None, mpu: Any = None,
                     **deepspeed_section: Any) -> dict[str, Any]:
    """Shard a model the caller loaded, in place, and return what deepspeed.init_inference needs to run it.

    For scripts that keep the call: `deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, tp_size=4))`.
    tp_size: 4 unless an mpu says otherwise. Afterwards `model.plan` and `model.load_report` say what this rank holds.
    Raises UserError as init_inference does.
    """
    check_arguments(deepspeed_section)
    _check_section(deepspeed_section)
    section = {} if tp_size is None else {"tp_size": tp_size}
    return _deepspeed_arguments(_shard_loaded(model, *_parallel(section, mpu), deepspeed_section), deepspeed_section)


def _parallel(section: Mapping[str, Any] | None, mpu: Any) -> tuple[TensorParallelSection, Any]:
    """The section, its tp_size that of the caller's mpu where there is one, and that mpu, which DeepSpeed's users may
    state in the section too."""
    stated = dict(section) if isinstance(section, Mapping) else section
    if isinstance(stated, dict):
        mpu = stated.pop("mpu", None) or mpu
    try:
        parallel = TensorParallelSection(**(stated or {}))
    except (ValidationError, TypeError):
        known = ", ".join(TensorParallelSection.model_fields)
        raise UserError(f"tensor_parallel={section!r}: write {{'tp_size': N}} (whole numbers; keys: {known}, "
                        "mpu); groups come from the launcher or the mpu") from None
    return _sized(parallel, mpu), mpu


def _sized(parallel: TensorParallelSection, mpu: Any) -> TensorParallelSection:
    """Raises UserError where the section states another tp_size than the mpu has."""
    if mpu is None:
        return parallel
    size = parallel_state.tp_size_of(mpu)
    if "tp_size" in parallel.model_fields_set and parallel.tp_size != size:
        raise UserError(f"tensor_parallel.tp_size is {parallel.tp_size}, the tensor-parallel group of the given mpu "
                        f"has {size} ranks; leave tp_size out or make them equal")
    return parallel.model_copy(update={"tp_size": size})


@dataclass(frozen=True)
class _Shard:
    """A model that has become this rank's shard, and what made it one."""

    model: nn.Module
    plan: Plan
    mpu: Mpu
    dtype: torch.dtype
    report: LoadReport
    parallel: TensorParallelSection


def _shard_loaded(model: nn.Module, parallel: TensorParallelSection, megatron: Any,
                  section: Mapping[str, Any]) -> _Shard:
    model_config = getattr(model, "config", None)
    if model_config is None:
        raise UserError(f"{type(model).__name__} has no .config; a Transformers model is needed")
    tp_size, mapping = parallel.tp_size, model_config.to_dict()
    policy = policy_for(mapping, f"{type(model).__name__}.config").experts_by(parallel.experts)
    geometry = policy.geometry(mapping)
    check_loaded(model, policy, geometry)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    plan = Plan(policy, geometry, tp_size, str(dtype).removeprefix("torch."), parallel.vision)
    require(policy.problems(geometry, tp_size), plan, type(model).__name__)
    _check_dtype(dtype)
    mpu = parallel_state.start(tp_size, megatron, _token_bytes(plan, dtype),
                               facts_of_model(model, plan, parallel, section))
    graphed = cuda_graph.wanted(section, mpu.tp, geometry.experts_per_token, policy.not_decoded)
    began, whole = time.perf_counter(), skeletons(model, plan)
    inject(model, plan, mpu.tp, model_source(model, policy), dtype, get_accelerator().current_device_name())
    report = LoadReport(0, plan.weight_bytes(mpu.tp.rank), time.perf_counter() - began)
    return _ready(_Shard(model, plan, mpu, dtype, report, parallel), whole, graphed)


def _shard_from_files(config: Config, megatron: Any) -> _Shard:
    directory, dtype = config.model.path, config.model.torch_dtype
    _check_section(config.deepspeed)
    parallel = _sized(config.tensor_parallel, megatron)
    plan, checkpoint = checked_plan(directory, **stated(config) | {"tp_size": parallel.tp_size})
    if megatron is None:
        parallel_state.check_world(read_environment().world_size, plan.tp_size)
    _check_dtype(dtype)
    kernels.check(plan.form, dtype, get_accelerator().device_name())
    model = build_on_meta(directory, plan.policy, dtype, config.model.attn_implementation)
    mpu = parallel_state.start(plan.tp_size, megatron, _token_bytes(plan, dtype),
                               facts_of_model(model, plan, parallel, config.deepspeed) | facts_of_config(config)
                               | {"quantization_config": repr(getattr(checkpoint, "form", None))})
    for note in (note_of_defaults(plan, shown(directory)), note_of_form(plan, checkpoint)):
        if mpu.world.rank == 0 and note:
            log.warning("%s", note)
    graphed = cuda_graph.wanted(config.deepspeed, mpu.tp, plan.geometry.experts_per_token, plan.policy.not_decoded)
    began, whole = time.perf_counter(), skeletons(model, plan)
    inject(model, plan, mpu.tp, checkpoint_source(checkpoint, mpu.tp.rank), dtype,
           get_accelerator().current_device_name())
    report = LoadReport(checkpoint.bytes_read, plan.weight_bytes(mpu.tp.rank), time.perf_counter() - began)
    return _ready(_Shard(model, plan, mpu, dtype, report, parallel), whole, graphed)


def _token_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Of what the ranks sum twice a layer for one token."""
    return plan.geometry.sizes["hidden"] * dtype.itemsize


def _ready(shard: _Shard, whole: Mapping[str, nn.Module], graphed: bool) -> _Shard:
    """Test the shards against `whole`, what some modules are for one process, and give the model its `generate`."""
    model, tp, every = shard.model, shard.mpu.tp, shard.parallel.desync_check
    model.plan, model.load_report = shard.plan, shard.report  # type: ignore[assignment]  # for callers of DeepSpeed
    model.eval().to(get_accelerator().current_device_name())
    if shard.parallel.self_test:
        self_test(model, shard.plan, tp, whole)
    checked = None
    if every:
        model.generate = finite_generate(model)  # type: ignore[assignment]
        checked = checked_generate(model, shard.plan, tp, every)
    generate = on_the_models_device(model, DecodeLoop(model, shard.plan, tp, graphed, checked))
    model.generate = checked_prompt(generate, shard.plan.geometry.sizes["vocab"], tp)  # type: ignore[assignment]
    return shard


def on_the_models_device(model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` for tensors on any device: they are moved to the model's, and what it returns to that of the prompt,
    as Transformers' own does."""
    def moved(*inputs: Any, **kwargs: Any) -> Any:
        device = next(model.parameters()).device
        given = [value for value in (*inputs, kwargs.get("inputs"), kwargs.get("input_ids"))
                 if isinstance(value, torch.Tensor)]
        home = given[0].device if given else device
        if home == device:
            return generate(*inputs, **kwargs)
        return move(generate(*move(inputs, device), **move(kwargs, device)), home)

    moved.__wrapped__ = generate  # type: ignore[attr-defined]
    return moved


def move(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it, through tuples, lists and mappings, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    if isinstance(value, dict):  # an output class of Transformers' is one, too
        return type(value)(**{key: move(item, device) for key, item in value.items()})
    return value


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in get_accelerator().supported_dtypes():
        known = ", ".join(map(str, get_accelerator().supported_dtypes()))
        raise UserError(f"{dtype}: DeepSpeed on {get_accelerator().device_name()} computes in {known}")


def _check_section(section: Mapping[str, Any]) -> None:
    """Let DeepSpeed judge its section before anything is loaded. Raises UserError."""
    for key in section.keys() & OWN_KEYS.keys():
        if section[key] is not False:  # an off switch is what the adapter wants too
            raise UserError(f"deepspeed.{key}: the adapter sets this itself; use {OWN_KEYS[key]}")
    try:
        DeepSpeedInferenceConfig(**section)
    except ValidationError as error:
        lines = [f"deepspeed.{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise UserError("DeepSpeed refuses this configuration:\n  " + "\n  ".join(lines)) from None


def _deepspeed_arguments(shard: _Shard, section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of deepspeed.init_inference: the user's section as it stands, and what the adapter owns."""
    mpu = shard.mpu
    context = {} if LIMITS & section.keys() else {"max_out_tokens": shard.plan.geometry.context}
    return {
        **context,  # DeepSpeed's default of 1024 would refuse most images
        **{key: value for key, value in section.items() if key != cuda_graph.KEY},  # DeepSpeed: one rank only
        "dtype": shard.dtype,
        "tensor_parallel": {"tp_size": shard.plan.tp_size, "mpu": mpu, "tp_group": mpu.tp.group},
        "injection_policy": _policy_by_class(shard.model, shard.plan.policy),
    }


def _policy_by_class(model: nn.Module, policy: Policy) -> dict[type[nn.Module], tuple[str, ...]]:
    """DeepSpeed's form of the policy: the class of each stack's layers -> its row-parallel linears."""
    modules = PublishedModules(model, policy)
    return {type(modules[f"{stack}.0"]): rows for stack, rows in row_parallel(policy).items()}


def _start_engine(shard: _Shard, section: Mapping[str, Any]) -> deepspeed.InferenceEngine:
    engine = deepspeed.init_inference(shard.model, **_deepspeed_arguments(shard, section))
    engine.plan, engine.load_report = shard.plan, shard.report
    engine.generate = _generate(engine)
    return engine


def _generate(engine: deepspeed.InferenceEngine) -> Callable[..., Any]:
    """`engine.generate`: the module's own, beams included, with the prompt limit DeepSpeed's has."""
    limit = engine._config.max_out_tokens

    def generate(*inputs: Any, **kwargs: Any) -> Any:
        ids = prompt_of(inputs, kwargs)
        if ids is not None and ids.shape[-1] > limit:
            raise UserError(f"prompt of {ids.shape[-1]} tokens: deepspeed.max_out_tokens allows {limit}")
        return engine.module.generate(*inputs, **kwargs)

    return generate
