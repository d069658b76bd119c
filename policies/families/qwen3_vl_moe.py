"""Qwen3-VL, mixture of experts: Qwen3-VL with a router and experts in place of the MLP, in most layers or all.

Transformers has it since 4.57; before 5 its experts compute with other arguments, so 5.0 is the first release here.
Files have the experts' matrices as [experts, in, out], Transformers 5 holds and writes them as [experts, out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.config import indices, integer, read_text, text_section
from policies.errors import UserError
from policies.families import qwen3_vl
from policies.families.qwen3_vl import LAYER
from policies.policy import Geometry
from policies.rules import Claim, Experts, Replicated

DENSE, SPARSE = "dense", "sparse"
STACK = LAYER.removesuffix(".*")

TABLE = (
    *(replace(claim, kind=DENSE) if claim.module.startswith(f"{LAYER}.mlp.") else claim for claim in qwen3_vl.TABLE),
    Claim(f"{LAYER}.mlp.gate", Replicated("every rank must choose the same experts; half a MB in bf16"),
          ("experts", "hidden"), kind=SPARSE),
    Claim(f"{LAYER}.mlp.experts", Experts("expert_mlp"), kind=SPARSE, transposed=True, others=(
        ("gate_up_proj", ("experts", "expert_gate_up", "hidden")),
        ("down_proj", ("experts", "hidden", "expert_mlp")))),
)


def geometry(config: Mapping[str, Any]) -> Geometry:
    """config.json -> Geometry. Raises UserError."""
    text = text_section(config)
    head_dim = integer(text, "hidden_size") // integer(text, "num_attention_heads")  # where none is stated
    dense = qwen3_vl.geometry_of(config, read_text(config, qwen3_vl.CONTEXT, head_dim), qwen3_vl.injected(config))
    # published files say num_experts; Transformers 5 writes num_local_experts
    stated = [key for key in ("num_experts", "num_local_experts") if key in text] or ["num_experts"]
    experts = integer(text, stated[0])
    if experts != integer(text, stated[-1]):
        raise UserError(f"config.json: 'num_experts' is {experts} and 'num_local_experts' {text[stated[-1]]}; they are "
                        "two names of one number")
    width = integer(text, "moe_intermediate_size")
    step, layers = integer(text, "decoder_sparse_step", 1), dense.layers[STACK]
    whole = indices(text, "mlp_only_layers") if text.get("mlp_only_layers") is not None else ()
    kinds = tuple(DENSE if i in whole or (i + 1) % step else SPARSE for i in range(layers))
    sizes = {**dense.sizes, "experts": experts, "expert_mlp": width, "expert_gate_up": 2 * width}
    return replace(dense, sizes=sizes, kinds={STACK: kinds},
                   experts_per_token=integer(text, "num_experts_per_tok", most=experts))


def problems(g: Geometry, tp_size: int) -> list[str]:
    """Every constraint this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run."""
    found = qwen3_vl.problems(g, tp_size)
    if (width := g.sizes["expert_mlp"]) < tp_size:
        found.append(f"tp_size {tp_size}: an expert (moe_intermediate_size) has only {width} elements to share")
    return found


POLICY = replace(
    qwen3_vl.POLICY,
    model_type="qwen3_vl_moe",
    model_class="Qwen3VLMoeForConditionalGeneration",
    first_release="5.0",
    table=TABLE,
    decoder=replace(qwen3_vl.DECODER, router="mlp.gate", experts="mlp.experts"),
    geometry=geometry,
    problems=problems,
)
