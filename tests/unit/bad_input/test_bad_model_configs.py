"""A config.json that says what cannot be, and directories and files of other formats in a model's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NUMBERS = ["hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size",
           "vocab_size", "max_position_embeddings", *(f"vision_config.{key}" for key in (
               "embed_dim", "depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size", "in_chans",
               "mlp_ratio"))]
NOT_A_SIZE = ["0", "-1", '"12"', "12.5", "1e400", "NaN", "null", "true", "[12]", "{}", "9" * 30, "9" * 400,
              "1000000000000"]
FIELDS: dict[str, list[str]] = {  # field=JSON -> words
    "num_attention_heads=5": ["hidden_size 24", "num_attention_heads 5"],
    "num_attention_heads=30": ["hidden_size 24", "num_attention_heads 30"],
    "num_key_value_heads=4": ["num_attention_heads 6", "num_key_value_heads 4"],
    "num_key_value_heads=7": ["num_attention_heads 6", "num_key_value_heads 7"],
    "vision_config.num_heads=5": ["embed_dim 12", "num_heads 5"],
    "num_hidden_layers=2": ["model.layers.1."],
    "num_hidden_layers=1000000": ["num_hidden_layers", "1000000"],
    "vision_config.depth=1000000000": ["depth", "1000000000"],
    "num_attention_heads=100000": ["num_attention_heads", "100000"],
    "model_type=null": ["model_type", "qwen2_vl"],
    'model_type="llama"': ["'llama'", "qwen2_vl"],
    'model_type="qwen2_6_vl"': ["'qwen2_6_vl'", "nearest"],
    'model_type="' + "q" * 100_000 + '"': ["model_type", "qqq"],
    "model_type=[]": ["model_type"],
    "vision_config=[1]": ["vision_config", "mapping"], "vision_config=null": ["'visual.", "1280", "more"],
    "vision_config=3": ["vision_config", "mapping"],
    'vision_config="none"': ["vision_config", "mapping"],
    "text_config=[1]": ["text_config", "mapping"],
    'tie_word_embeddings="no"': ["tie_word_embeddings", "'no'"],
    "tie_word_embeddings=0": ["tie_word_embeddings", "0"],
    "rope_scaling=null": ["mrope_section", "missing"],
    "rope_scaling=[1]": ["rope_scaling", "mapping"],
    'rope_scaling="mrope"': ["rope_scaling", "mapping"],
    'rope_scaling={"type": "mrope"}': ["mrope_section", "missing"],
    'rope_scaling={"mrope_section": 2}': ["mrope_section", "2"],
    'rope_scaling={"mrope_section": [2]}': ["mrope_section", "[2]"],
    'rope_scaling={"mrope_section": [2, -1, 1]}': ["mrope_section", "-1"],
    'rope_scaling={"mrope_section": [1, 1, "0"]}': ["mrope_section", "'0'"],
    'rope_scaling={"mrope_section": [16, 24, 24]}': ["mrope_section", "64", "head_dim 4"],
    "rope_theta=0": ["rope_theta", "0"], "rope_theta=-1": ["rope_theta", "-1"],
    'rope_theta="big"': ["rope_theta", "'big'"], "rope_theta=NaN": ["rope_theta", "nan"],
    "rms_norm_eps=-1e-6": ["rms_norm_eps"], 'rms_norm_eps="1e-6"': ["rms_norm_eps", "'1e-6'"],
    "rms_norm_eps=Infinity": ["rms_norm_eps", "inf"], "rms_norm_eps=true": ["rms_norm_eps", "True"],
    'image_token_id="<|image_pad|>"': ["image_token_id", "<|image_pad|>"],
    "image_token_id=-1": ["image_token_id", "-1"], "video_token_id=1.5": ["video_token_id", "1.5"],
    "vision_start_token_id=[7]": ["vision_start_token_id", "[7]"],
}


def put(model: Path, field: str, value: str) -> None:
    config = json.loads((model / "config.json").read_text())
    *outer, key = field.split(".")
    section = config[outer[0]] if outer else config
    section[key] = "@here@"
    (model / "config.json").write_text(json.dumps(config).replace('"@here@"', value))


@pytest.mark.parametrize(("field", "value"), [
    (field, value) for field in NUMBERS for value in NOT_A_SIZE
    if not (field.endswith("mlp_ratio") and value == "12.5")  # a ratio may be a fraction
], ids=lambda word: word[:20])
def test_a_number_of_config_json(refuse, field, value):
    refuse(lambda model: put(model, field, value), ["config.json", field.split(".")[-1]])


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field[:40])
def test_a_field_of_config_json(refuse, field):
    refuse(lambda model: put(model, *field.split("=", 1)), FIELDS[field])


# Directories of other formats

LORA = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {  # files with what is in them -> words
    "LoRA": ({"adapter_config.json": LORA, "adapter_model.safetensors": ""},
             ["LORA adapter of Qwen/Qwen2-VL-7B-Instruct", "model.adapters", "merge_and_unload",
              "save_pretrained", "model.path="]),
    "LoRA, its config broken": ({"adapter_config.json": []}, ["PEFT adapter", "merge"]),
    "LoRA beside the base's config": ({"adapter_config.json": LORA, "config.json": None}, ["LORA adapter of", "merge"]),
    "nothing": ({}, ["empty"]),
    "GGUF": ({"model-q4.gguf": "GGUF"}, ["GGUF", "model-q4.gguf", "safetensors"]),
    "pickles": ({"pytorch_model.bin": "x"}, ["pytorch_model.bin", "run code", "save_pretrained"]),
    "pickles beside config.json": ({"pytorch_model.bin": "x", "config.json": None}, ["pytorch_model.bin", "run code"]),
    "pt": ({"a.pt": "x", "b.pt": "x"}, ["a.pt and 1 more", "save_pretrained"]),
    "DeepSpeed": ({"zero_to_fp32.py": "x", "latest": "global_step9", "global_step9/mp_rank_00_model_states.pt": "x"},
                  ["DeepSpeed", "zero_to_fp32.py", "safe_serialization"]),
    "DeepSpeed, a step": ({"mp_rank_00_model_states.pt": "x"}, ["DeepSpeed", "zero_to_fp32.py"]),
    "Megatron": ({"latest_checkpointed_iteration.txt": "9", "iter_0000009/mp_rank_00/model.pt": "x"}, ["Megatron"]),
    "Megatron, an iteration": ({"mp_rank_00/model.pt": "x"}, ["Megatron"]),
    "distributed": ({"__0_0.distcp": "x", ".metadata": "x"}, ["torch.distributed", "__0_0.distcp"]),
    "diffusers": ({"model_index.json": {}, "unet/config.json": {}}, ["diffusers", "vision-language"]),
    "a trainer's": ({"checkpoint-500/model.safetensors": "x", "runs/x": ""}, ["checkpoint-500", "name one"]),
    "the cache's": ({"snapshots/0a1b/config.json": {}, "refs/main": "0a1b"}, ["cache", "hub id"]),
    "weights alone": ({"model.safetensors": "x"}, ["model.safetensors", "config.json"]),
    "only text": ({"config.json": {"model_type": "qwen2", "hidden_size": 64}}, ["'qwen2'", "text", "vision_config"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_directory_of_another_format(refuse, sound, case):
    files, words = OTHERS[case]

    def change(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        for name, content in files.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            whole = (sound[1] / "config.json").read_text()
            (model / name).write_text(whole if content is None else content if isinstance(content, str)
                                      else json.dumps(content))

    assert refuse(change, words).count("\n") <= 3


@pytest.mark.parametrize("file", ["model.gguf", "model.safetensors"])
def test_a_file_instead_of_a_directory(refused, tmp_path, file):
    (tmp_path / file).write_bytes(b"GGUF")
    (tmp_path / "c.yaml").write_text(f"model: {{path: {file}}}")
    refused("generate", "--config", tmp_path / "c.yaml", words=["not a directory", file, "directory that it is in"])


def test_there_are_enough_of_them():
    assert len(FIELDS) + len(NUMBERS) * len(NOT_A_SIZE) - 1 >= 200
