"""Qwen2-VL: the whole mapping, text encoder and vision encoder.

Names are those of the published checkpoints; `RENAMES` maps what Transformers 4.52 and later call them. Shapes are
[out, in], as torch.nn.Linear stores them. One all-reduce ends each attention and each MLP of either encoder.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from policies.errors import UserError
from policies.policy import Attention, DecoderNames, Encoder, Geometry, Policy, Rows
from policies.rules import Claim, Column, FusedQKV, Head, HeadNumbers, Replicated, Row, Vocab

NORM = Replicated("norms act on whole hidden states, which every rank holds; a few KB")

TABLE = (
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
    merged=("visual.merger.mlp.0", "visual.merger.mlp.2"), features="pooler_output", width="hidden")

CONTEXT = 32768
TEXT_DEFAULTS = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False}  # Transformers', of all releases
VISION_DEFAULTS = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_chans": 3, "patch_size": 14,
                   "spatial_merge_size": 2, "temporal_patch_size": 2}

RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))
MOST_SIZE, MOST_LAYERS, MOST_HEADS = 2**31 - 1, 1024, 1024  # what is beyond is a mistake, and would take for ever


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json (text fields flat as published, or nested under text_config) -> Geometry. Raises UserError."""
    text, stated = {**config, **_section(config, "text_config")}, _section(config, "vision_config")
    vision = {**VISION_DEFAULTS, **stated}
    hidden, heads = _int(text, "hidden_size"), _int(text, "num_attention_heads", most=MOST_HEADS)
    kv_heads = _int(text, "num_key_value_heads", most=MOST_HEADS)
    v_hidden, v_heads = _int(vision, "embed_dim"), _int(vision, "num_heads", most=MOST_HEADS)
    side = _int(vision, "spatial_merge_size")
    merge = side**2
    head_dim = hidden // heads
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise UserError(f"config.json: 'tie_word_embeddings' is {reprlib.repr(tied)}; true or false is needed")
    _check_what_only_forward_reads(text, head_dim if hidden == heads * head_dim else None)
    sizes = {
        "vocab": _int(text, "vocab_size"), "hidden": hidden, "q": heads * head_dim, "kv": kv_heads * head_dim,
        "mlp": _int(text, "intermediate_size"), "v_hidden": v_hidden, "v_q": v_hidden, "v_qkv": 3 * v_hidden,
        "v_mlp": int(v_hidden * _positive(vision, "mlp_ratio")), "merger": v_hidden * merge, "merged": v_hidden * merge,
        "channels": _int(vision, "in_channels", _int(vision, "in_chans")),
        "frames": _int(vision, "temporal_patch_size"), "patch": _int(vision, "patch_size"),
    }
    return Geometry(
        sizes=sizes,
        attention={"text": Attention(heads, kv_heads, head_dim),
                   "vision": Attention(v_heads, v_heads, v_hidden // v_heads)},
        layers={"model.layers": _int(text, "num_hidden_layers", most=MOST_LAYERS),
                "visual.blocks": _int(vision, "depth", most=MOST_LAYERS)},
        tied=tied,
        context=_int(text, "max_position_embeddings", CONTEXT),
        patch_values=sizes["channels"] * sizes["frames"] * sizes["patch"] ** 2,
        merge_side=side,
        assumed=_assumed(text, stated),
    )


def _assumed(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a person left out of config.json, with the defaults that stand in.

    What a release of Transformers wrote has its number under transformers_version. Some releases leave out each vision
    key that has its default, so a file where another one is stated with its default has been changed since.
    """
    found: dict[str, Any] = {}
    by_transformers = "transformers_version" in text
    if not by_transformers:
        found = {key: value for key, value in TEXT_DEFAULTS.items() if key not in text}
    unstated = {key: value for key, value in VISION_DEFAULTS.items() if key not in vision}
    if "in_channels" in vision:
        unstated.pop("in_chans", None)
    kept = [key for key in VISION_DEFAULTS if key != "in_chans" and vision.get(key) == VISION_DEFAULTS[key]]
    if kept or not by_transformers:
        found |= {f"vision_config.{key}": value for key, value in unstated.items()}
    return found


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: {key!r} is {reprlib.repr(section)}; a mapping is needed")
    return section


def _check_what_only_forward_reads(text: Mapping[str, Any], head_dim: int | None) -> None:
    """Fields that shard nothing, but that stop a model in its first forward, when every rank has long been loaded."""
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"  # the former since Transformers 5
    rope = _section(text, name)
    stated = {key: value for key, value in {**text, **rope}.items() if value is not None}
    for key in stated.keys() & {"rms_norm_eps", "rope_theta"}:
        _positive(stated, key)
    for key in stated.keys() & {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}:
        _int(stated, key, least=0)
    section = rope.get("mrope_section")
    if section is None:
        raise UserError(f"config.json: {name}.mrope_section is missing; three whole numbers are needed")
    whole = isinstance(section, list | tuple) and all(type(n) is int and n >= 0 for n in section)
    if not whole or len(section) != 3:
        raise UserError(f"config.json: {name}.mrope_section is {reprlib.repr(section)}; three whole numbers are needed")
    if head_dim and head_dim % 2 == 0 and 2 * sum(section) != head_dim:
        raise UserError(f"config.json: {name}.mrope_section {section} has a sum of {sum(section)}; head_dim {head_dim} "
                        f"(hidden_size / num_attention_heads) needs {head_dim // 2}")


def _positive(section: Mapping[str, Any], key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_SIZE:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; a positive number is needed")
    return value


def _int(
    section: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = MOST_SIZE
) -> int:
    value = section.get(key, default)
    if value is None:
        raise UserError(f"config.json: {key!r} is missing; no default fits every model, so state it")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; a positive whole number is needed")
    if value > most:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; {most} is the most that can be")
    return value


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    text, vision, found = g.attention["text"], g.attention["vision"], []
    if not 1 <= tp_size <= text.q_heads:
        found.append(f"tp_size {tp_size}: each rank needs a query head and there are {text.q_heads}")
    if text.q_heads * text.head_dim != g.sizes["hidden"]:
        found.append(f"hidden_size {g.sizes['hidden']} is not a multiple of num_attention_heads {text.q_heads}")
    elif text.head_dim % 2:
        found.append(f"head_dim {text.head_dim} (hidden_size {g.sizes['hidden']} / {text.q_heads} heads) is not even, "
                     "which its rotary embedding needs")
    if text.q_heads % text.kv_heads:
        found.append(f"num_attention_heads {text.q_heads} is not a multiple of num_key_value_heads {text.kv_heads}")
    if vision.q_heads * vision.head_dim != g.sizes["v_hidden"]:
        found.append(f"vision embed_dim {g.sizes['v_hidden']} is not a multiple of num_heads {vision.q_heads}")
    elif vision.head_dim % 4:
        found.append(f"vision head_dim {vision.head_dim} (embed_dim {g.sizes['v_hidden']} / {vision.q_heads} heads) is "
                     "not a multiple of 4, which its rotary embedding needs")
    found += [f"tp_size {tp_size}: {name} has only {g.sizes[name]} elements to share"
              for name in ("vocab", "mlp", "v_mlp", "merger") if g.sizes[name] < tp_size]
    return found


POLICY = Policy(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    table=TABLE,
    head_axes={"q": ("text", "q"), "kv": ("text", "kv"), "v_q": ("vision", "q")},
    head_numbers=HEAD_NUMBERS,
    renames=RENAMES,
    media_tokens=("image_token_id", "video_token_id", "vision_start_token_id"),
    ignored=("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    decoder=DecoderNames("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head",
                         unused=("self_attn.rotary_emb",)),  # of releases before 4.57
    rows=ROWS,
    encoder=ENCODER,
    geometry=geometry,
    problems=problems,
)
