"""adapter_config.json of a LoRA adapter: its ranks and factors, and what in it a merge cannot express."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapter.config.files import read_text

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 8 << 20
MERGE_IT = "merge it with peft's merge_and_unload, and point model.path at the result"
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations that change the base's weights
HARMLESS = frozenset((  # keys that change nothing in B, A and their factor once training is over
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "velora_config",
    "fan_in_fan_out",  # PEFT itself sets it to false for a torch.nn.Linear, which all modules here are
))
REFUSED = {
    "use_dora": "DoRA scales the rows of the merged weight", "lora_bias": "B has a bias",
    "modules_to_save": "whole modules were trained beside it",
    "trainable_token_indices": "token embeddings were trained",
    "target_parameters": "it updates parameters that are no module's weight, such as a mixture's experts",
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "it acts on the tokens after these alone",
    "use_qalora": "it is for a quantised model", "bias": "biases were trained",
}
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Pattern = Annotated[str, Field(max_length=200)]


class LoraConfig(BaseModel):
    """What decides r and the factor of each module. Keys that are not here are judged by `_refusals`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    r: Rank
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, float] | None = None

    def rank(self, module: str) -> int:
        """r of a module by the name that it had in training."""
        return _matching(self.rank_pattern or {}, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B @ A, as PEFT has it: alpha / r, of rank-stabilised LoRA alpha / sqrt(r)."""
        alpha, r = _matching(self.alpha_pattern or {}, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the name matches, as PEFT's get_pattern_key finds it."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_lora_config(directory: Path, problems: list[str]) -> LoraConfig | None:
    """The config of an adapter directory; None where it cannot be merged: why goes to `problems`."""
    try:
        stated = json.loads(read_text(directory / CONFIG, MAX_CONFIG_BYTES))
        if not isinstance(stated, dict):
            raise ValueError(f"it holds a {type(stated).__name__}, a mapping is needed")
    except FileNotFoundError:
        problems.append(f"{CONFIG}: missing; an adapter is a directory that PEFT's save_pretrained wrote")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{CONFIG}: cannot be read as JSON: {error}")
        return None
    if refusals := list(_refusals(stated)):
        problems += [f"{CONFIG}: {refusal}" for refusal in refusals]
        return None
    try:
        config = LoraConfig.model_validate(stated)
    except ValidationError as error:
        problems += [f"{CONFIG}: {'.'.join(map(str, e['loc']))} = {reprlib.repr(e['input'])}: {e['msg']}"
                     for e in error.errors(include_url=False)[:10]]
        return None
    bad = [p for patterns in (config.rank_pattern, config.alpha_pattern) for p in patterns or {} if not _sound(p)]
    problems += [f"{CONFIG}: the pattern {pattern!r} of rank_pattern or alpha_pattern is no regular expression of at "
                 "most 3 repetitions, none of a group; write the names of modules" for pattern in bad]
    return None if bad else config


def _refusals(stated: Mapping[str, Any]) -> list[str]:
    """What the config has beside B, A and their factor, each with what to do."""
    if (kind := stated.get("peft_type")) != "LORA":
        return [f"peft_type = {reprlib.repr(kind)}: LORA is what is merged here; {MERGE_IT}"]
    found = []
    for key, value in stated.items():
        if key in LoraConfig.model_fields or key in HARMLESS or key == "peft_type" or not value:
            continue
        if (key, value) == ("bias", "none") or (key == "init_lora_weights" and not _changes_base(value)):
            continue
        why = REFUSED.get(key, "this release does not know what it changes")
        if key == "init_lora_weights":
            why = "it was trained on weights that this initialisation had changed"
        found.append(f"{key} = {reprlib.repr(value)}: {why}; {MERGE_IT}")
    return found


def _changes_base(initialisation: object) -> bool:
    return not isinstance(initialisation, bool) and str(initialisation).lower().startswith(CHANGED_BASE)


def _sound(pattern: str) -> bool:
    """Whether it is a regular expression that no name can make slow."""
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return len(re.findall(r"[*+?{]", pattern)) <= 3 and not re.search(r"\)[*+?{]", pattern)
