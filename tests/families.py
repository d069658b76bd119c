"""Small random checkpoints of the families beside Qwen2-VL, built and written by Transformers itself: names, shapes and
files are those of its release, and none of them come from the policies that they test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from checkpoints import EOS, IMAGE, VIDEO, VISION_END, VISION_START, random_tensor
from safetensors.torch import load_file, save_file

IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
       "vision_end_token_id": VISION_END}
TEXT = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0, "intermediate_size": 200, "num_hidden_layers": 3,
        "max_position_embeddings": 4096, "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "vocab_size": 203}
VISION = {"depth": 3, "hidden_size": 64, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
          "temporal_patch_size": 2}
CONFIGS = {
    "qwen2_5_vl": IDS | {
        "text_config": TEXT | {"hidden_size": 96, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
        "vision_config": VISION | {  # windows of 2 x 2 tokens; 172 is 4 x 43
            "intermediate_size": 172, "out_hidden_size": 96, "window_size": 56, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": IDS | {  # 12 heads of 8 are not the hidden size
        "text_config": TEXT | {"hidden_size": 80, "head_dim": 8, "rope_scaling": {
            "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        "vision_config": VISION | {
            "intermediate_size": 172, "out_hidden_size": 80, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2]},
    },
}
CONFIGS["qwen3_vl_moe"] = CONFIGS["qwen3_vl"] | {"text_config": CONFIGS["qwen3_vl"]["text_config"] | {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "mlp_only_layers": [1]}}
CONFIGS["qwen3_5"] = IDS | {  # 16 key heads of 8 with two value heads of 6 each; 6 of a head's 24 numbers are rotated
    "text_config": TEXT | {
        "hidden_size": 80, "head_dim": 24, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "mrope_interleaved": True,
            "partial_rotary_factor": 0.25},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
    "vision_config": VISION | {"intermediate_size": 172, "out_hidden_size": 80, "num_position_embeddings": 16},
}
CLASSES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5"}


def make_family(directory: Path, family: str, dtype: torch.dtype = torch.float32, ids: Mapping[str, int] = IDS,
                **text: object) -> Path:
    """Write a checkpoint of `family` with random weights. ids: of special tokens. text: changes of its text_config.
    Returns the directory."""
    name = CLASSES[family]
    stated = CONFIGS[family] | ids | {"text_config": CONFIGS[family]["text_config"] | text}
    config_class = getattr(transformers, f"{name}Config")
    if "text_config" not in config_class.sub_configs:  # releases before 4.52 have its fields beside the others
        stated |= stated.pop("text_config")
    config = config_class(**stated)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(parameter_name, tuple(parameter.shape)))
    model.save_pretrained(directory, max_shard_size="200KB")
    file = directory / "config.json"  # to which 4.57 does not write what published files state
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [type(model).__name__]}))
    return directory


def transpose_experts(directory: Path) -> None:
    """Rewrite a checkpoint's experts as published files have them: [experts, in, out]."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()},
                  file, {"format": "pt"})


DEMO = Path(__file__).resolve().parents[1] / "launch" / "demo" / "checkpoint"
TOKENIZER = ("chat_template.json", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
             "vocab.json")
PROCESSORS = {  # processor, image processor, video processor
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
}
PROCESSORS["qwen3_vl_moe"] = PROCESSORS["qwen3_5"] = PROCESSORS["qwen3_vl"]
CLIP = {"min_pixels": 4096, "max_pixels": 100352}  # of all frames of a video together


def make_whole(directory: Path, family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a checkpoint of `family` with the demo's tokenizer and a processor of its own: a directory that every
    command takes. changes: of its text_config. Returns it."""
    demo = json.loads((DEMO / "config.json").read_text())
    ids = {key: demo[key] for key in IDS}
    text = {key: demo[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} | {"pad_token_id": None}
    make_family(directory, family, dtype, ids, **text, **changes)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, directory / name)
    whole, image, video = PROCESSORS[family]
    stated = json.loads((DEMO / "preprocessor_config.json").read_text()) | {"processor_class": whole}
    (directory / "preprocessor_config.json").write_text(json.dumps(stated | {"image_processor_type": image}))
    clip = {"size": {"shortest_edge": CLIP["min_pixels"], "longest_edge": CLIP["max_pixels"]}}
    stated |= {"video_processor_type": video} | (clip if family.startswith("qwen3_") else {})
    (directory / "video_preprocessor_config.json").write_text(json.dumps(stated))
    return directory
