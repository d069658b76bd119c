"""`bench --write-hardware`: the summary of a benchmark -> the machine, as `launch/plan.py --hardware` reads it.

Reading, matrix product and all-reduce are measured by themselves. What is left of a decode step beside reading and
collectives becomes the overhead of its layers; what the first token then took beside overhead and collectives says
which part of the matrix product's rate was achieved. So a prediction for this model, request and tp_size repeats the
measurement, and one for others starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapter.planning.cost_model import Workload, predict
from adapter.planning.hardware import AllReduce, Efficiency, Hardware, Tflops
from adapter.planning.plan import Plan

Figures = Mapping[str, Any]
LEAST_PART = 1e-3  # of a rate, that is taken for achieved


def calibrated(plan: Plan, summary: Figures) -> Hardware:
    """The machine that a job of this plan was measured on."""
    hardware = _measured(plan, summary)
    load = Workload(summary["prompt_tokens"], tuple(summary["patches"]), summary["new_tokens"])
    ideal = predict(plan, hardware, load).decode
    rest_s = max(0.0, 1 / summary["decode_tok_s"]["median"] - ideal.total_s)
    overhead_us = rest_s * 1e6 / ideal.work.layers * min(1.0, hardware.devices_per_rank(plan.tp_size))
    hardware = hardware.model_copy(update={"per_layer_overhead_us": _short(overhead_us)})
    first = predict(plan, hardware, load).first
    compute_s = sum(phase.compute_s for phase in first)
    other_s = sum(phase.collective_s + phase.overhead_s for phase in first)
    part = compute_s / max(summary["ttft_s"]["median"] - other_s, compute_s)
    part = _short(min(1.0, max(LEAST_PART, part)))
    return hardware.model_copy(update={"efficiency": Efficiency(matmul=part, attention=part, memory_read=1.0)})


def _measured(plan: Plan, summary: Figures) -> Hardware:
    """What needs no model: rates, the collective, memory. Overheads are none yet, and every rate is achieved."""
    on_cpu, ranks = summary["device"] == "cpu", plan.tp_size
    rates, reads = ([each["median"] for each in summary[key]] for key in ("matmul_gflop_s", "read_gb_s"))
    cores = min(summary["devices"], ranks * summary["threads"])  # that computed
    tflop_s = (sum(rates) / cores if on_cpu else min(rates)) / 1e3
    held = [pss["median"] - own for pss, own in zip(summary["pss_bytes"], summary["weight_bytes"], strict=True)]
    source = (f"measured by launch/bench.py: {summary['prompt_tokens']} prompt tokens, {summary['new_tokens']} new, "
              f"{summary['dtype']}, weights {summary['format']}, tp_size {summary['tp_size']}, medians of "
              f"{summary['repeats']}; the overhead and the achieved parts are those with which a prediction for that "
              "comes to what was measured")
    return Hardware(
        name=summary["machine"], source=source, kind="cpu" if on_cpu else "accelerator", devices=summary["devices"],
        memory_gb=_short(summary["memory_bytes"] / 1e9), memory_read_gb_s=_short(sum(reads) if on_cpu else min(reads)),
        matmul_tflop_s=Tflops(**{plan.dtype: _short(tflop_s)}),
        efficiency=Efficiency(matmul=1.0, attention=1.0, memory_read=1.0),
        all_reduce=(_all_reduce(ranks, summary),) if ranks > 1 else (),
        per_layer_overhead_us=0.0, per_step_overhead_us=0.0, process_memory_gb=_short(max(0, *held) / 1e9))


def _all_reduce(ranks: int, summary: Figures) -> AllReduce:
    """The line through the all-reduce of a decode step and that of the prompt; where the smaller was no faster, all of
    the larger's time is its bytes'."""
    (small, small_us), (large, large_us) = (
        (summary["collective_bytes"][name], summary["collective_us"][name]["median"])
        for name in ("all_reduce_decode", "all_reduce_prefill"))
    slope = (large_us - small_us) / (large - small) if large_us > small_us and large > small else large_us / large
    per_byte = AllReduce(ranks=ranks, latency_us=0.0, bandwidth_gb_s=1.0).per_reduced_byte
    return AllReduce(ranks=ranks, latency_us=_short(max(0.0, small_us - slope * small)),
                     bandwidth_gb_s=_short(per_byte / slope / 1e3))  # bytes/us are 1e-3 GB/s


def _short(value: float) -> float:
    """Four digits, as many as a noisy figure has at most."""
    return float(f"{value:.4g}")
