"""The plan of a model directory: from config.json and the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapter.checkpoint.lora import Adapter, MergedCheckpoint, open_adapters
from adapter.checkpoint.other_formats import other_format
from adapter.checkpoint.quantised import form_of
from adapter.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from adapter.checkpoint.sharded import MergedAdapter, Shards, is_sharded, open_shards
from adapter.config.hub import shown
from adapter.planning.plan import Plan, sizes_in_words
from policies.errors import UserError, shortened
from policies.formats import FORMATS
from policies.registry import policy_for

if TYPE_CHECKING:
    from adapter.config.schema import Config

WITHOUT_WEIGHTS = "config.json alone is fine for `plan`; to run, put the checkpoint's safetensors files there"


def stated(config: Config) -> dict[str, Any]:
    """What a config says of the plan: arguments of make_plan and checked_plan."""
    model, parallel = config.model, config.tensor_parallel
    return {"tp_size": parallel.tp_size, "dtype": model.dtype, "vision": parallel.vision,
            "form": config.weights.format, "adapters": model.adapters, "experts": parallel.experts}


def make_plan(directory: Path, tp_size: int, dtype: str, vision: str = "tensor", form: str = "dense",
              adapters: Sequence[Path] = (), experts: Literal["tensor", "expert"] = "tensor",
              ) -> tuple[Plan, Checkpoint | Shards | None, list[str]]:
    """The plan for a model directory, its weights (None where it holds none) and every problem found.

    adapters: LoRA directories, which the weights are read with. experts: what of a mixture of experts is divided.
    Raises UserError only where there is nothing to plan (no config.json, unknown model type, impossible numbers in it).
    """
    config = read_config(directory)
    policy = policy_for(config, f"{shown(directory)}/config.json").experts_by(experts)
    geometry = policy.geometry(config)
    problems = policy.problems(geometry, tp_size)
    plan = Plan(policy, geometry, tp_size, dtype, vision, FORMATS[form])
    before = len(problems)
    opened = open_adapters(adapters, policy, geometry, config, problems)
    if is_sharded(directory):
        shards = open_shards(directory, plan, merged_adapters(opened if len(problems) == before else ()))
        return plan, shards, problems + shards.problems
    try:
        checkpoint = open_checkpoint(directory, policy, form_of(config))
    except UserError as error:  # a form that is not read: then its tensors mean nothing
        return plan, open_checkpoint(directory, policy), [*problems, str(error)]
    if checkpoint is not None:
        if checkpoint.form and geometry.experts_per_token:
            problem = f"experts that are stored quantised ({checkpoint.form}) cannot be read; use the bfloat16 release"
            return plan, checkpoint, [*problems, problem]
        problems += [*_rounded_twice(plan, checkpoint), *checkpoint.check(policy, geometry)]
        checkpoint = MergedCheckpoint.of(checkpoint, opened, dtype) if opened else checkpoint
    if not problems:
        problems += plan.off_group()
    return plan, checkpoint, problems


def _rounded_twice(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Why the files' codes cannot take weights.format: 4 bits are rounded to 8 at a small cost (a step of 8 bits is at
    most 15 / 127 of one of 4), and to 4 of other groups at more than the first rounding."""
    form = checkpoint.form
    if form is None or form.bits != plan.form.bits or form.bits > 4:
        return []
    return [f"weights.format {plan.form.name}: the files hold codes of {form.bits} bits already ({form}), and rounding "
            "them to other groups would cost more than the first rounding did; use weights.format=int8 or dense, or "
            "the bfloat16 release"]


def merged_adapters(adapters: Sequence[Adapter]) -> tuple[MergedAdapter, ...]:
    """Adapters as shards.json knows them."""
    return tuple(MergedAdapter(name=adapter.directory.name, digest=adapter.digest) for adapter in adapters)


def checked_plan(directory: Path, tp_size: int, dtype: str, *more: Any,
                 **others: Any) -> tuple[Plan, Checkpoint | Shards]:
    """The plan and the weights, both sound, for the arguments of make_plan. Raises one UserError with every problem
    and the tp sizes that work."""
    plan, checkpoint, problems = make_plan(directory, tp_size, dtype, *more, **others)
    if checkpoint is None:
        missing = "no safetensors file here (model.safetensors or model.safetensors.index.json); "
        problems.insert(0, missing + (other_format(directory) or WITHOUT_WEIGHTS))
    require_sound(plan, checkpoint, problems, shown(directory))
    assert checkpoint is not None
    return plan, checkpoint


def require_sound(plan: Plan, checkpoint: Checkpoint | Shards | None, problems: list[str], name: str) -> None:
    """Raise one UserError with every problem of a model directory; nothing where there is none."""
    if isinstance(checkpoint, Shards) and problems:
        raise UserError("\n  ".join([f"{name}: these shards cannot be loaded:", *shortened(problems)]))
    require(problems, plan, name)


def require(problems: list[str], plan: Plan, what: str) -> None:
    """Raise one UserError with every problem, and the tp sizes that would work where this is none of them; nothing
    where there is no problem."""
    if not problems:
        return
    sizes, lines = plan.sizes_that_work(), "\n  ".join(shortened(problems))
    if plan.tp_size not in sizes:
        raise UserError(f"{what} cannot run at tp_size {plan.tp_size}:\n  {lines}\n"
                        f"tp sizes that would work: {sizes_in_words(sizes)}")
    raise UserError(f"{what}: {lines}" if len(problems) == 1 else f"{what} cannot be used:\n  {lines}")


def note_of_defaults(plan: Plan, name: str) -> str | None:
    """Name the keys that config.json does not state and the defaults that stand in; None where it states all."""
    if not plan.geometry.assumed:
        return None
    keys = ", ".join(f"{key} ({default})" for key, default in plan.geometry.assumed.items())
    return f"note: {name}/config.json does not state {keys}; Transformers' defaults, in brackets, are used"


def note_of_form(plan: Plan, checkpoint: Checkpoint | Shards | None) -> str | None:
    """Say how the files hold the weights, and the ranks; None where the files are not quantised."""
    if not isinstance(checkpoint, Checkpoint) or checkpoint.form is None:
        return None
    held = plan.dtype if plan.form.bits == 0 else f"{plan.dtype} and {plan.form.name}"
    return (f"note: the files are quantised ({checkpoint.form}); ranks decode them as they read, and hold the weights "
            f"in {held}: that is the memory a rank needs")
