"""Qwen2.5-VL: Qwen2-VL's text decoder; a vision encoder with RMS norms and gated MLPs that attends in windows.

Transformers has it since 4.49. Its windows lie inside a frame, and some layers attend to the whole frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.config import (
    MOST_HEADS,
    MOST_LAYERS,
    indices,
    integer,
    problems_of_heads,
    read_text,
    section,
    unstated,
)
from policies.families import qwen2_vl
from policies.families.qwen2_vl import NORM
from policies.policy import Attention, Geometry
from policies.rules import Claim, Column, FusedQKV, Replicated, Row

TABLE = (
    *qwen2_vl.TEXT,
    Claim("visual.patch_embed.proj", Replicated("a convolution of 3 MB in bf16 whose output every rank needs whole"),
          ("v_hidden", "channels", "frames", "patch", "patch")),
    Claim("visual.blocks.*.norm1", NORM, ("v_hidden",)),
    Claim("visual.blocks.*.attn.qkv", FusedQKV("v_q"), ("v_qkv", "v_hidden"), ("v_qkv",)),
    Claim("visual.blocks.*.attn.proj", Row(), ("v_hidden", "v_q"), ("v_hidden",)),
    Claim("visual.blocks.*.norm2", NORM, ("v_hidden",)),
    Claim("visual.blocks.*.mlp.gate_proj", Column(), ("v_mlp", "v_hidden"), ("v_mlp",)),
    Claim("visual.blocks.*.mlp.up_proj", Column(), ("v_mlp", "v_hidden"), ("v_mlp",)),
    Claim("visual.blocks.*.mlp.down_proj", Row(), ("v_hidden", "v_mlp"), ("v_hidden",)),
    Claim("visual.merger.ln_q", NORM, ("v_hidden",)),
    Claim("visual.merger.mlp.0", Column(), ("merger", "merged"), ("merger",)),
    Claim("visual.merger.mlp.2", Row(), ("hidden", "merger"), ("hidden",)),
)

TEXT_DEFAULTS = {"max_position_embeddings": qwen2_vl.CONTEXT, "tie_word_embeddings": False}
VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json (text fields flat as published, or nested under text_config) -> Geometry. Raises UserError."""
    text = read_text(config, qwen2_vl.CONTEXT)
    vision = {**VISION_DEFAULTS, **section(config, "vision_config")}
    v_hidden, v_heads = integer(vision, "hidden_size"), integer(vision, "num_heads", most=MOST_HEADS)
    side, depth = integer(vision, "spatial_merge_size"), integer(vision, "depth", most=MOST_LAYERS)
    patch = integer(vision, "patch_size")
    sizes = {
        **text.sizes, "v_hidden": v_hidden, "v_q": v_hidden, "v_qkv": 3 * v_hidden,
        "v_mlp": integer(vision, "intermediate_size"), "merger": v_hidden * side**2, "merged": v_hidden * side**2,
        "channels": integer(vision, "in_channels"), "frames": integer(vision, "temporal_patch_size"), "patch": patch,
        "v_out": integer(vision, "out_hidden_size"),
    }
    # the encoder's own arithmetic: a window is so many tokens a side, each of `side` patches
    window = integer(vision, "window_size", least=side * patch) // side // patch * side
    whole = {n for n in indices(vision, "fullatt_block_indexes") if n < depth}
    return Geometry(
        sizes=sizes,
        attention={"text": text.attention, "vision": Attention(v_heads, v_heads, v_hidden // v_heads)},
        layers={"model.layers": text.layers, "visual.blocks": depth},
        tied=text.tied,
        context=text.context,
        merge_side=side,
        windowed_layers=depth - len(whole),
        window_patches=window**2,
        assumed=unstated(config, TEXT_DEFAULTS, VISION_DEFAULTS, {"in_channels": "in_chans"}),
    )


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    found = problems_of_heads(g, tp_size, "hidden_size", ("vocab", "mlp", "v_mlp", "merger"))
    if g.sizes["v_out"] != g.sizes["hidden"]:
        found.append(f"vision out_hidden_size {g.sizes['v_out']} is not hidden_size {g.sizes['hidden']}")
    return found


POLICY = replace(
    qwen2_vl.POLICY,
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    first_release="4.49",
    table=TABLE,
    geometry=geometry,
    problems=problems,
    dialects=(),
)
