"""Qwen2-VL: the whole mapping, text encoder and vision encoder.

Names are those of the published checkpoints; `RENAMES` maps what Transformers 4.52 and later call them. Shapes are
[out, in], as torch.nn.Linear stores them. One all-reduce ends each attention and each MLP of either encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.config import (
    MOST_HEADS,
    MOST_LAYERS,
    integer,
    positive,
    problems_of_heads,
    read_text,
    section,
    unstated,
)
from policies.policy import Attention, DecoderNames, Encoder, Geometry, Policy, Rows
from policies.rules import Claim, Column, FusedQKV, Head, HeadNumbers, Replicated, Row, Vocab

NORM = Replicated("norms act on whole hidden states, which every rank holds; a few KB")

TEXT = (
    Claim("model.embed_tokens", Vocab(), ("vocab", "hidden")),
    Claim("model.layers.*.input_layernorm", NORM, ("hidden",)),
    Claim("model.layers.*.self_attn.q_proj", Column(), ("q", "hidden"), ("q",)),
    Claim("model.layers.*.self_attn.k_proj", Column(), ("kv", "hidden"), ("kv",)),
    Claim("model.layers.*.self_attn.v_proj", Column(), ("kv", "hidden"), ("kv",)),
    Claim("model.layers.*.self_attn.o_proj", Row(), ("hidden", "q")),
    Claim("model.layers.*.post_attention_layernorm", NORM, ("hidden",)),
    Claim("model.layers.*.mlp.gate_proj", Column(), ("mlp", "hidden")),
    Claim("model.layers.*.mlp.up_proj", Column(), ("mlp", "hidden")),
    Claim("model.layers.*.mlp.down_proj", Row(), ("hidden", "mlp")),
    Claim("model.norm", NORM, ("hidden",)),
    Claim("lm_head", Head(), ("vocab", "hidden")),
)
TABLE = (
    *TEXT,
    Claim("visual.patch_embed.proj", Replicated("a convolution of 3 MB in bf16 whose output every rank needs whole"),
          ("v_hidden", "channels", "frames", "patch", "patch")),
    Claim("visual.blocks.*.norm1", NORM, ("v_hidden",), ("v_hidden",)),
    Claim("visual.blocks.*.attn.qkv", FusedQKV("v_q"), ("v_qkv", "v_hidden"), ("v_qkv",)),
    Claim("visual.blocks.*.attn.proj", Row(), ("v_hidden", "v_q"), ("v_hidden",)),
    Claim("visual.blocks.*.norm2", NORM, ("v_hidden",), ("v_hidden",)),
    Claim("visual.blocks.*.mlp.fc1", Column(), ("v_mlp", "v_hidden"), ("v_mlp",)),
    Claim("visual.blocks.*.mlp.fc2", Row(), ("v_hidden", "v_mlp"), ("v_hidden",)),
    Claim("visual.merger.ln_q", NORM, ("v_hidden",), ("v_hidden",)),
    Claim("visual.merger.mlp.0", Column(), ("merger", "merged"), ("merger",)),
    Claim("visual.merger.mlp.2", Row(), ("hidden", "merger"), ("hidden",)),
)

# Attention attributes of any Transformers release -> what they are on a shard. 4.45-4.51 reshape to `hidden_size`.
HEAD_NUMBERS = (
    HeadNumbers("model.layers.*.self_attn", "text", {
        "num_heads": "slots", "num_key_value_heads": "kv_heads", "num_key_value_groups": "groups",
        "hidden_size": "width"}),
    HeadNumbers("visual.blocks.*.attn", "vision", {"num_heads": "slots", "dim": "width"}),
)

ROWS: tuple[tuple[str, Rows], ...] = (
    ("visual.merger.mlp.", "merged"), ("visual.", "patch"), ("model.", "token"), ("lm_head", "last"))
ENCODER = Encoder(
    module="visual", stack="visual.blocks", heads="vision", patches="hidden_states", grid="grid_thw",
    features="pooler_output", width="hidden")

CONTEXT = 32768
TEXT_DEFAULTS = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False}  # Transformers', of all releases
VISION_DEFAULTS = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_chans": 3, "patch_size": 14,
                   "spatial_merge_size": 2, "temporal_patch_size": 2}

RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json (text fields flat as published, or nested under text_config) -> Geometry. Raises UserError."""
    text, vision = read_text(config, CONTEXT), {**VISION_DEFAULTS, **section(config, "vision_config")}
    v_hidden, v_heads = integer(vision, "embed_dim"), integer(vision, "num_heads", most=MOST_HEADS)
    side = integer(vision, "spatial_merge_size")
    sizes = {
        **text.sizes, "v_hidden": v_hidden, "v_q": v_hidden, "v_qkv": 3 * v_hidden,
        "v_mlp": int(v_hidden * positive(vision, "mlp_ratio")), "merger": v_hidden * side**2,
        "merged": v_hidden * side**2, "channels": integer(vision, "in_channels", integer(vision, "in_chans")),
        "frames": integer(vision, "temporal_patch_size"), "patch": integer(vision, "patch_size"),
    }
    return Geometry(
        sizes=sizes,
        attention={"text": text.attention, "vision": Attention(v_heads, v_heads, v_hidden // v_heads)},
        layers={"model.layers": text.layers, "visual.blocks": integer(vision, "depth", most=MOST_LAYERS)},
        tied=text.tied,
        context=text.context,
        merge_side=side,
        assumed=unstated(config, TEXT_DEFAULTS, VISION_DEFAULTS, {"in_chans": "in_channels"}),
    )


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    return problems_of_heads(g, tp_size, "embed_dim", ("vocab", "mlp", "v_mlp", "merger"))


POLICY = Policy(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    first_release="4.45",
    table=TABLE,
    head_axes={"q": ("text", "q"), "kv": ("text", "kv"), "v_q": ("vision", "q")},
    head_numbers=HEAD_NUMBERS,
    renames=RENAMES,
    media_tokens=("image_token_id", "video_token_id", "vision_start_token_id"),
    ignored=("*rotary_emb.inv_freq", "*rotary_pos_emb.inv_freq"),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    decoder=DecoderNames("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head",
                         unused=("self_attn.rotary_emb",)),  # of releases before 4.57
    rows=ROWS,
    encoder=ENCODER,
    geometry=geometry,
    problems=problems,
    dialects=("injection_policy", "partition_config", "tp_plan"),
)
