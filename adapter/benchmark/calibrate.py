"""`bench --write-hardware`: the summary of a benchmark -> the machine, as `launch/plan.py --hardware` reads it.

Reading, matrix product and all-reduce are measured by themselves. What is left of a decode step beside reading and
collectives becomes the overhead of its layers; what the first token then took beside overhead and collectives says
which part of the matrix product's rate was achieved. So a prediction for this model, request and tp_size repeats the
measurement, and one for others starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adapter.planning.cost_model import Workload, predict
from adapter.planning.hardware import Hardware
from adapter.planning.plan import DTYPE_BYTES, Plan

Figures = Mapping[str, Any]


def write_hardware(plan: Plan, summary: Figures, file: Path) -> None:
    """Write the machine that a job of this plan was measured on."""
    facts = _measured(plan, summary)
    load = Workload(summary["prompt_tokens"], tuple(summary["patches"]), summary["new_tokens"])
    hardware = Hardware.model_validate(facts)
    ideal = predict(plan, hardware, load).decode
    rest_s = max(0.0, 1 / summary["decode_tok_s"]["median"] - ideal.total_s)
    overhead_us = rest_s * 1e6 / ideal.work.layers * min(1.0, hardware.devices_per_rank(plan.tp_size))
    facts["per_layer_overhead_us"] = _short(overhead_us)
    first = predict(plan, Hardware.model_validate(facts), load).first
    compute_s = sum(phase.compute_s for phase in first)
    other_s = sum(phase.collective_s + phase.overhead_s for phase in first)
    part = _short(max(1e-3, compute_s / max(summary["ttft_s"]["median"] - other_s, compute_s)))
    facts["efficiency"] |= {"matmul": part, "attention": part}
    file.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _measured(plan: Plan, summary: Figures) -> dict[str, Any]:
    """What needs no model: rates, the collective, memory. Overheads are none yet, and every rate is achieved."""
    on_cpu, ranks = summary["device"] == "cpu", plan.tp_size
    rates, reads = ([each["median"] for each in summary[key]] for key in ("matmul_gflop_s", "read_gb_s"))
    cores = min(summary["devices"], ranks * summary["threads"])  # that computed
    held = [pss["median"] - own for pss, own in zip(summary["pss_bytes"], summary["weight_bytes"], strict=True)]
    source = (f"measured by launch/bench.py: {summary['prompt_tokens']} prompt tokens, {summary['new_tokens']} new, "
              f"{summary['dtype']}, weights {summary['format']}, tp_size {ranks}, medians of {summary['repeats']}; the "
              "overhead and the achieved parts are those with which a prediction for that comes to what was measured")
    return {
        "name": summary["machine"], "source": source, "kind": "cpu" if on_cpu else "accelerator",
        "devices": summary["devices"], "memory_gb": _short(summary["memory_bytes"] / 1e9),
        "memory_read_gb_s": _short(sum(reads) if on_cpu else min(reads)),
        "matmul_tflop_s": {plan.dtype: _short((sum(rates) / cores if on_cpu else min(rates)) / 1e3)},
        "efficiency": {"matmul": 1.0, "attention": 1.0, "memory_read": 1.0},
        "all_reduce": [_all_reduce(plan, summary)] if ranks > 1 else [],
        "per_layer_overhead_us": 0.0, "per_step_overhead_us": 0.0, "process_memory_gb": _short(max(0, *held) / 1e9),
    }


def _all_reduce(plan: Plan, summary: Figures) -> dict[str, float]:
    """The line through the all-reduce of a decode step and that of the prompt; where the smaller was no faster, all of
    the larger's time is its bytes'."""
    ranks, us = plan.tp_size, {name: each["median"] for name, each in summary["collective_us"].items()}
    small_us, large_us = us["all_reduce_decode"], us["all_reduce_prefill"]
    small = plan.geometry.sizes["hidden"] * DTYPE_BYTES[plan.dtype]
    large = small * summary["prompt_tokens"]
    us_per_byte = (large_us - small_us) / (large - small) if large_us > small_us and large > small else large_us / large
    sent = 2 * (ranks - 1) / ranks  # of each byte, by a rank
    return {"ranks": ranks, "latency_us": _short(max(0.0, small_us - us_per_byte * small)),
            "bandwidth_gb_s": _short(sent / us_per_byte / 1e3)}  # bytes/us are 1e-3 GB/s


def _short(value: float) -> float:
    """Four digits, as many as a noisy figure has at most."""
    return float(f"{value:.4g}")
