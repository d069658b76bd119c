"""Model directories of other formats: what one is by the names of its files, and how to make a model of it."""

from __future__ import annotations

import json
import os
from fnmatch import filter as matching
from pathlib import Path

from adapter.config.files import read_text

MOST_BYTES = 1 << 20
LOADED = "load it with Transformers' from_pretrained in a trusted environment, and save it with save_pretrained(OUT)"
FORMATS = (  # names of files -> what has them, what to do
    (("*.gguf",), "GGUF weights, which llama.cpp reads", "use the safetensors release that they were made from"),
    (("zero_to_fp32.py", "global_step*", "mp_rank_*_model_states.pt"), "a DeepSpeed training checkpoint",
     "run `python zero_to_fp32.py . OUT --safe_serialization` in it, and copy config.json and the processor's files of "
     "the model it was trained from to OUT"),
    (("latest_checkpointed_iteration.txt", "iter_[0-9]*", "mp_rank_[0-9]*"), "a Megatron checkpoint",
     "convert it to Transformers' format with the tool that wrote it"),
    (("*.distcp",), "a checkpoint of torch.distributed", "convert it to Transformers' format with what trained it"),
    (("model_index.json",), "a diffusers pipeline", "name a vision-language model of Transformers"),
    (("checkpoint-[0-9]*",), "a trainer's output directory", "name one of its checkpoints"),
    (("snapshots",), "a model's folder in Hugging Face's cache", "set model.path to the model's hub id"),
    (("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"), "weights whose files can run code when opened", LOADED),
    (("*.safetensors",), "safetensors files without the config.json of their model", "copy it here"),
)


def other_format(directory: Path) -> str | None:
    """Say what a directory without a config.json or without weights is, and what to do; None where nobody knows."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not names:
        return "the directory is empty; was the download interrupted?"
    if "adapter_config.json" in names:
        return _adapter(directory)
    for patterns, what, advice in FORMATS:
        if found := [name for pattern in patterns for name in matching(names, pattern)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"it holds {what} ({found[0]}{more}): {advice}"
    return None


def _adapter(directory: Path) -> str:
    try:
        stated = json.loads(read_text(directory / "adapter_config.json", MOST_BYTES))
        kind, base = str(stated["peft_type"])[:40], str(stated["base_model_name_or_path"])[:200]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind, base = "PEFT", "its base model"
    return (f"it holds a {kind} adapter of {base}, not a model: set model.path to that model and model.adapters to a "
            "list with this directory; or merge it once with peft, PeftModel.from_pretrained(...).merge_and_unload()."
            "save_pretrained(OUT), save the base's processor to OUT, and set model.path=OUT")
