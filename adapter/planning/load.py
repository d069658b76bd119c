"""The plan of a model directory: from config.json and the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapter.checkpoint.lora import Adapter, MergedCheckpoint, open_adapters
from adapter.checkpoint.other_formats import other_format
from adapter.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from adapter.checkpoint.sharded import MergedAdapter, Shards, is_sharded, open_shards
from adapter.config.hub import shown
from adapter.planning.plan import Plan, sizes_in_words
from policies.errors import UserError, shortened
from policies.formats import FORMATS
from policies.registry import policy_for

WITHOUT_WEIGHTS = "config.json alone is fine for `plan`; to run, put the checkpoint's safetensors files there"


def make_plan(directory: Path, tp_size: int, dtype: str, vision: str = "tensor", form: str = "dense",
              adapters: Sequence[Path] = ()) -> tuple[Plan, Checkpoint | Shards | None, list[str]]:
    """The plan for a model directory, its weights (None where it holds none) and every problem found.

    adapters: LoRA directories, which the weights are read with.
    Raises UserError only where there is nothing to plan (no config.json, unknown model type, impossible numbers in it).
    """
    config = read_config(directory)
    policy = policy_for(config, f"{shown(directory)}/config.json")
    geometry = policy.geometry(config)
    problems = policy.problems(geometry, tp_size)
    plan = Plan(policy, geometry, tp_size, dtype, vision, FORMATS[form])
    before = len(problems)
    opened = open_adapters(adapters, policy, geometry, config, problems)
    if is_sharded(directory):
        shards = open_shards(directory, plan, merged_adapters(opened if len(problems) == before else ()))
        return plan, shards, problems + shards.problems
    checkpoint = open_checkpoint(directory, policy)
    if checkpoint is not None:
        problems += checkpoint.check(policy, geometry)
        checkpoint = MergedCheckpoint.of(checkpoint, opened, dtype) if opened else checkpoint
    if not problems:
        problems += plan.off_group()
    return plan, checkpoint, problems


def merged_adapters(adapters: Sequence[Adapter]) -> tuple[MergedAdapter, ...]:
    """Adapters as shards.json knows them."""
    return tuple(MergedAdapter(name=adapter.directory.name, digest=adapter.digest) for adapter in adapters)


def checked_plan(directory: Path, tp_size: int, dtype: str, vision: str = "tensor", form: str = "dense",
                 adapters: Sequence[Path] = ()) -> tuple[Plan, Checkpoint | Shards]:
    """The plan and the weights, both sound. Raises one UserError with every problem and the tp sizes that work."""
    plan, checkpoint, problems = make_plan(directory, tp_size, dtype, vision, form, adapters)
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
