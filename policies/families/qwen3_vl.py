"""Qwen3-VL, dense: queries and keys are normalised head by head, head_dim is a number of its own, and features of some
vision layers (DeepStack) are added after each of the first text layers.

Transformers has it since 4.57. Published names are those in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.config import (
    MOST_HEADS,
    MOST_LAYERS,
    TextNumbers,
    indices,
    integer,
    problems_of_heads,
    read_text,
    section,
    unstated,
)
from policies.families.qwen2_vl import NORM
from policies.policy import Attention, DecoderNames, Encoder, Geometry, Policy
from policies.rules import Claim, Column, FusedQKV, Head, HeadNumbers, PerHead, Replicated, Row, Vocab

HEAD_NORM = "a norm of head_dim numbers, the same for all heads"
LAYER, BLOCK, VISION = "model.language_model.layers.*", "model.visual.blocks.*", "model.visual"
DEEPSTACK = f"{VISION}.deepstack_merger_list"

TABLE = (
    Claim("model.language_model.embed_tokens", Vocab(), ("vocab", "hidden")),
    Claim(f"{LAYER}.input_layernorm", NORM, ("hidden",)),
    Claim(f"{LAYER}.self_attn.q_proj", Column(), ("q", "hidden")),
    Claim(f"{LAYER}.self_attn.k_proj", Column(), ("kv", "hidden")),
    Claim(f"{LAYER}.self_attn.v_proj", Column(), ("kv", "hidden")),
    Claim(f"{LAYER}.self_attn.q_norm", PerHead(HEAD_NORM, "q"), ("head_dim",)),
    Claim(f"{LAYER}.self_attn.k_norm", PerHead(HEAD_NORM, "kv"), ("head_dim",)),
    Claim(f"{LAYER}.self_attn.o_proj", Row(), ("hidden", "q")),
    Claim(f"{LAYER}.post_attention_layernorm", NORM, ("hidden",)),
    Claim(f"{LAYER}.mlp.gate_proj", Column(), ("mlp", "hidden")),
    Claim(f"{LAYER}.mlp.up_proj", Column(), ("mlp", "hidden")),
    Claim(f"{LAYER}.mlp.down_proj", Row(), ("hidden", "mlp")),
    Claim("model.language_model.norm", NORM, ("hidden",)),
    Claim("lm_head", Head(), ("vocab", "hidden")),
    Claim(f"{VISION}.patch_embed.proj", Replicated("a convolution of 4 MB in bf16 whose output every rank needs whole"),
          ("v_hidden", "channels", "frames", "patch", "patch"), ("v_hidden",)),
    Claim(f"{VISION}.pos_embed", Replicated("a table of 5 MB in bf16 that is interpolated for each image's grid"),
          ("v_positions", "v_hidden")),
    Claim(f"{BLOCK}.norm1", NORM, ("v_hidden",), ("v_hidden",)),
    Claim(f"{BLOCK}.attn.qkv", FusedQKV("v_q"), ("v_qkv", "v_hidden"), ("v_qkv",)),
    Claim(f"{BLOCK}.attn.proj", Row(), ("v_hidden", "v_q"), ("v_hidden",)),
    Claim(f"{BLOCK}.norm2", NORM, ("v_hidden",), ("v_hidden",)),
    Claim(f"{BLOCK}.mlp.linear_fc1", Column(), ("v_mlp", "v_hidden"), ("v_mlp",)),
    Claim(f"{BLOCK}.mlp.linear_fc2", Row(), ("v_hidden", "v_mlp"), ("v_hidden",)),
    Claim(f"{VISION}.merger.norm", NORM, ("v_hidden",), ("v_hidden",)),
    Claim(f"{VISION}.merger.linear_fc1", Column(), ("merger", "merged"), ("merger",)),
    Claim(f"{VISION}.merger.linear_fc2", Row(), ("hidden", "merger"), ("hidden",)),
    Claim(f"{DEEPSTACK}.*.norm", NORM, ("merged",), ("merged",)),
    Claim(f"{DEEPSTACK}.*.linear_fc1", Column(), ("merger", "merged"), ("merger",)),
    Claim(f"{DEEPSTACK}.*.linear_fc2", Row(), ("hidden", "merger"), ("hidden",)),
)

CONTEXT, HEAD_DIM = 128000, 128
INDEXES = "deepstack_visual_indexes"
TEXT_DEFAULTS = {"max_position_embeddings": CONTEXT, "head_dim": HEAD_DIM, "tie_word_embeddings": False}
VISION_DEFAULTS = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    INDEXES: [8, 16, 24],
}


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json -> Geometry. Raises UserError."""
    return geometry_of(config, read_text(config, CONTEXT, HEAD_DIM), injected(config))


def injected(config: Mapping[str, Any]) -> int:
    """The number of DeepStack layers."""
    return len(indices({**VISION_DEFAULTS, **section(config, "vision_config")}, INDEXES))


def geometry_of(config: Mapping[str, Any], text: TextNumbers, injected: int) -> Geometry:
    """The geometry of a model of this text decoder and a vision encoder that has `injected` DeepStack layers."""
    vision = {**VISION_DEFAULTS, **section(config, "vision_config")}
    v_hidden, v_heads = integer(vision, "hidden_size"), integer(vision, "num_heads", most=MOST_HEADS)
    side, depth = integer(vision, "spatial_merge_size"), integer(vision, "depth", most=MOST_LAYERS)
    sizes = {
        **text.sizes, "head_dim": text.attention.head_dim, "v_hidden": v_hidden, "v_q": v_hidden,
        "v_qkv": 3 * v_hidden, "v_mlp": integer(vision, "intermediate_size"), "merger": v_hidden * side**2,
        "merged": v_hidden * side**2, "channels": integer(vision, "in_channels"),
        "frames": integer(vision, "temporal_patch_size"), "patch": integer(vision, "patch_size"),
        "v_positions": integer(vision, "num_position_embeddings"), "v_out": integer(vision, "out_hidden_size"),
    }
    return Geometry(
        sizes=sizes,
        attention={"text": text.attention, "vision": Attention(v_heads, v_heads, v_hidden // v_heads)},
        layers={"model.language_model.layers": text.layers, f"{VISION}.blocks": depth},
        tied=text.tied,
        context=text.context,
        merge_side=side,
        injected_layers=injected,
        lists={DEEPSTACK: injected},
        assumed=unstated(config, TEXT_DEFAULTS, VISION_DEFAULTS, {}),
    )


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    found = problems_of_heads(g, tp_size, "hidden_size", ("vocab", "mlp", "v_mlp", "merger"), stated_head_dim=True)
    if g.sizes["v_out"] != g.sizes["hidden"]:
        found.append(f"vision out_hidden_size {g.sizes['v_out']} is not hidden_size {g.sizes['hidden']}")
    return found


DECODER = DecoderNames(
    "model.language_model.embed_tokens", "model.language_model.rotary_emb", "model.language_model.norm", "lm_head",
    q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
POLICY = Policy(
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    first_release="4.57",
    table=TABLE,
    head_axes={"q": ("text", "q"), "kv": ("text", "kv"), "v_q": ("vision", "q")},
    head_numbers=(
        HeadNumbers(f"{LAYER}.self_attn", "text", {"num_key_value_groups": "groups"}),
        HeadNumbers(f"{BLOCK}.attn", "vision", {"num_heads": "slots", "dim": "width"}),
    ),
    renames=(),
    media_tokens=("image_token_id", "video_token_id", "vision_start_token_id"),
    ignored=(),
    tied=("lm_head.weight", "model.language_model.embed_tokens.weight"),
    decoder=DECODER,
    rows=((f"{VISION}.merger.linear_", "merged"), (f"{DEEPSTACK}.", "merged"), (f"{VISION}.", "patch"),
          ("model.", "token"), ("lm_head", "last")),
    encoder=Encoder(module=VISION, stack=f"{VISION}.blocks", heads="vision", patches="hidden_states", grid="grid_thw",
                    features="pooler_output", width="hidden", injected="deepstack_features"),
    geometry=geometry,
    problems=problems,
)
