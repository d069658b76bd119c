"""Qwen3.5, dense: most layers have a gated delta rule in place of attention, the others attention with an output gate;
norms are 1 + w; a quarter of each head is rotated. The vision encoder is Qwen3-VL's without DeepStack.

Transformers has it since 5.2. Published names are those in memory. What is divided of a linear layer is a key head with
its value heads, which lie one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.config import MOST_HEADS, integer, read_text, text_section, unstated
from policies.errors import UserError
from policies.families import qwen3_vl
from policies.families.qwen3_vl import HEAD_NORM, LAYER
from policies.policy import Attention, DeltaNet, Geometry
from policies.rules import Claim, Column, Fused, HeadNumbers, InPlace, PerHead, Row

LINEAR, FULL = "linear_attention", "full_attention"  # as `layer_types` has them
STACK, DELTA = LAYER.removesuffix(".*"), f"{LAYER}.linear_attn"
QKV = ("lin_k", "lin_k", "lin_v")

ATTENTION = tuple(
    replace(claim, kind=FULL, weight=("q_gate", "hidden") if claim.module.endswith("q_proj") else claim.weight)
    for claim in qwen3_vl.TABLE if claim.module.startswith(f"{LAYER}.self_attn."))
LINEAR_ATTENTION = (
    Claim(DELTA, InPlace((("lin_qkv", QKV),)), kind=LINEAR, others=(
        ("dt_bias", ("lin_heads",)), ("A_log", ("lin_heads",)), ("conv1d.weight", ("lin_qkv", "one", "lin_width")))),
    Claim(f"{DELTA}.in_proj_qkv", Fused(QKV), ("lin_qkv", "hidden"), kind=LINEAR),
    Claim(f"{DELTA}.in_proj_z", Column(), ("lin_v", "hidden"), kind=LINEAR),
    Claim(f"{DELTA}.in_proj_b", Column(), ("lin_heads", "hidden"), kind=LINEAR),
    Claim(f"{DELTA}.in_proj_a", Column(), ("lin_heads", "hidden"), kind=LINEAR),
    Claim(f"{DELTA}.norm", PerHead(HEAD_NORM, "lin_v"), ("lin_head",), kind=LINEAR),
    Claim(f"{DELTA}.out_proj", Row(), ("hidden", "lin_v"), kind=LINEAR),
)
REST = tuple(claim for claim in qwen3_vl.TABLE
             if not claim.module.startswith((f"{LAYER}.self_attn.", f"{qwen3_vl.DEEPSTACK}.")))
TABLE = (*REST[:2], *LINEAR_ATTENTION, *ATTENTION, *REST[2:])  # in the order in which they run

CONTEXT, HEAD_DIM, ROTATED, EVERY = 32768, 256, 0.25, 4
TEXT_DEFAULTS = {"max_position_embeddings": CONTEXT, "head_dim": HEAD_DIM, "tie_word_embeddings": False}
LINEAR_DEFAULTS = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
                   "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
VISION_DEFAULTS = {key: default for key, default in qwen3_vl.VISION_DEFAULTS.items() if key != qwen3_vl.INDEXES}


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json -> Geometry. Raises UserError."""
    text = {**LINEAR_DEFAULTS, **text_section(config)}
    whole = qwen3_vl.geometry_of(config, read_text(config, CONTEXT, HEAD_DIM, ROTATED), injected=0)
    keys, values = (integer(text, f"linear_num_{of}_heads", most=MOST_HEADS) for of in ("key", "value"))
    key_dim, value_dim = (integer(text, f"linear_{of}_head_dim") for of in ("key", "value"))
    sizes = {
        **whole.sizes, "q_gate": 2 * whole.sizes["q"], "lin_k": keys * key_dim, "lin_v": values * value_dim,
        "lin_qkv": 2 * keys * key_dim + values * value_dim, "lin_heads": values, "lin_head": value_dim, "one": 1,
        "lin_width": integer(text, "linear_conv_kernel_dim"),
    }
    return replace(whole, sizes=sizes, kinds={STACK: kinds(text, whole.layers[STACK])},
                   attention={**whole.attention, "linear": Attention(keys, keys, key_dim)},
                   assumed=unstated(config, TEXT_DEFAULTS | LINEAR_DEFAULTS, VISION_DEFAULTS, {}))


def kinds(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The kind of each layer: `layer_types`, or every `full_attention_interval`-th attends. Raises UserError."""
    stated = text.get("layer_types")
    if stated is None:
        every = integer(text, "full_attention_interval", EVERY)
        return tuple(LINEAR if (i + 1) % every else FULL for i in range(layers))
    if not isinstance(stated, list | tuple) or len(stated) != layers or not set(map(str, stated)) <= {LINEAR, FULL}:
        raise UserError(f"config.json: 'layer_types' is {str(stated)[:200]}; {LINEAR!r} or {FULL!r} is needed for each "
                        f"of {layers} layers")
    return tuple(map(str, stated))


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    found, keys, values = qwen3_vl.problems(g, tp_size), g.attention["linear"].q_heads, g.sizes["lin_heads"]
    if LINEAR not in g.kinds[STACK]:
        return found
    if tp_size > keys:
        found.append(f"tp_size {tp_size}: each rank needs a key head of the linear layers (linear_num_key_heads) and "
                     f"there are {keys}")
    if values % keys:
        found.append(f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")
    return found


POLICY = replace(
    qwen3_vl.POLICY,
    model_type="qwen3_5",
    model_class="Qwen3_5ForConditionalGeneration",
    first_release="5.2",
    table=TABLE,
    head_axes={
        **qwen3_vl.POLICY.head_axes,
        "q_gate": ("text", "q"), "lin_k": ("linear", "q"), "lin_v": ("linear", "q"), "lin_heads": ("linear", "q")},
    head_numbers=(
        *(replace(row, kind=FULL if row.encoder == "text" else None) for row in qwen3_vl.POLICY.head_numbers),
        HeadNumbers(DELTA, "linear", {
            "num_k_heads": "owned", "num_v_heads": ("lin_heads",), "key_dim": ("lin_k",), "value_dim": ("lin_v",),
            "conv_dim": QKV}, kind=LINEAR),
        HeadNumbers(f"{DELTA}.conv1d", "linear", {"in_channels": QKV, "out_channels": QKV, "groups": QKV}, kind=LINEAR),
    ),
    ignored=("mtp.*",),
    decoder=None,
    not_decoded="its linear layers keep a state and a convolution, and its norms are 1 + w",
    delta_net=DeltaNet(
        module=DELTA, kind=LINEAR, heads="linear", qkv="in_proj_qkv", beta="in_proj_b", decay="in_proj_a", norm="norm",
        convolution="conv1d.weight", log_decay="A_log", bias="dt_bias", key="lin_k", value="lin_v",
        value_heads="lin_heads", width="lin_width"),
    rows=tuple(row for row in qwen3_vl.POLICY.rows if not row[0].startswith(qwen3_vl.DEEPSTACK)),
    encoder=replace(qwen3_vl.POLICY.encoder, injected=None),
    geometry=geometry,
    problems=problems,
)
