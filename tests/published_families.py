"""config.json of the published checkpoints of the families beside Qwen2-VL: what of them decides a plan."""

from __future__ import annotations

from typing import Any

IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
       "vision_end_token_id": 151653, "tie_word_embeddings": False}


def qwen2_5_vl(hidden: int, layers: int, heads: int, kv: int, mlp: int, v_mlp: int, tied: bool = False,
               vocab: int = 152064) -> dict[str, Any]:
    """Text fields lie flat beside vision_config."""
    return IDS | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "transformers_version": "4.41.2", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": v_mlp, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2},
    }


SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
TINY = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def qwen3_vl(hidden: int, layers: int, heads: int, mlp: int, vision: dict[str, Any],
             tied: bool = False) -> dict[str, Any]:
    """Text fields lie under text_config. All sizes have 8 KV heads of 128."""
    return IDS | {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "transformers_version": "4.57.0.dev0", "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": hidden, "intermediate_size": mlp, "head_dim": 128,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "vocab_size": 151936,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "tie_word_embeddings": tied},
        "vision_config": vision | {
            "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": hidden, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2},
    }


def qwen3_vl_moe(hidden: int, layers: int, heads: int, mlp: int, width: int) -> dict[str, Any]:
    """128 experts of which a token has 8, in every layer; 4 KV heads."""
    dense = qwen3_vl(hidden, layers, heads, mlp, LARGE)
    text = dense["text_config"] | {
        "model_type": "qwen3_vl_moe_text", "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": width, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return dense | {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
                    "text_config": text, "vision_config": dense["vision_config"] | {"model_type": "qwen3_vl_moe"}}


def qwen3_5(hidden: int, layers: int, heads: int, kv: int, values: int, mlp: int, vision: dict[str, Any],
            tied: bool = False) -> dict[str, Any]:
    """Heads of 256; every fourth layer attends, the others have 16 key heads and `values` value heads of 128."""
    return IDS | {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "transformers_version": "4.57.0.dev0", "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_5_text", "hidden_size": hidden, "intermediate_size": mlp, "head_dim": 256,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "vocab_size": 248320, "attn_output_gate": True,
            "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": values,
            "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
            "tie_word_embeddings": tied,
            "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                                "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
        "vision_config": {key: value for key, value in vision.items() if key != "deepstack_visual_indexes"} | {
            "model_type": "qwen3_5", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
            "num_heads": vision.get("num_heads", 16), "num_position_embeddings": 2304, "out_hidden_size": hidden,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": []},
    }


PUBLISHED = {
    "Qwen2.5-VL-3B": qwen2_5_vl(2048, 36, 16, 2, 11008, 3420, tied=True, vocab=151936),
    "Qwen2.5-VL-7B": qwen2_5_vl(3584, 28, 28, 4, 18944, 3420),
    "Qwen2.5-VL-32B": qwen2_5_vl(5120, 64, 40, 8, 27648, 3456),
    "Qwen2.5-VL-72B": qwen2_5_vl(8192, 80, 64, 8, 29568, 3456),
    "Qwen3-VL-2B": qwen3_vl(2048, 28, 16, 6144, SMALL, tied=True),
    "Qwen3-VL-4B": qwen3_vl(2560, 36, 32, 9728, SMALL, tied=True),
    "Qwen3-VL-8B": qwen3_vl(4096, 36, 32, 12288, LARGE),
    "Qwen3-VL-32B": qwen3_vl(5120, 64, 64, 25600, LARGE),
    "Qwen3-VL-30B-A3B": qwen3_vl_moe(2048, 48, 32, 6144, 768),
    "Qwen3-VL-235B-A22B": qwen3_vl_moe(4096, 94, 64, 12288, 1536),
    "Qwen3.5-0.8B": qwen3_5(1024, 24, 8, 2, 16, 3584, TINY, tied=True),
    "Qwen3.5-9B": qwen3_5(4096, 32, 16, 4, 32, 12288, LARGE),
    "Qwen3.5-27B": qwen3_5(5120, 64, 24, 4, 48, 17408, LARGE),
}
