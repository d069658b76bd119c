"""The summary of a benchmark -> what adapter.planning.hardware calls a machine, for `launch/plan.py --hardware`.

Reading, matrix product and all-reduce are measured by themselves. What is left of a decode step beside reading and
collectives becomes the overhead of its layers; what the first token then took beside overhead and collectives says
which part of the matrix product's rate was achieved. So a prediction for this model, request and tp_size repeats the
measurement, and one for others starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapter.planning.cost_model import Prediction, Workload, predict
from adapter.planning.hardware import AllReduce, Efficiency, Hardware, Tflops
from adapter.planning.plan import Plan

Figures = Mapping[str, Any]
LEAST_PART = 1e-3  # of a rate, that is taken for achieved
PERFECT = Efficiency(matmul=1.0, attention=1.0, memory_read=1.0)


def calibrated(plan: Plan, summary: Figures) -> Hardware:
    """The machine that a job of this plan was measured on."""
    hardware = _measured(plan, summary)
    load = Workload(summary["prompt_tokens"], tuple(summary["patches"]), summary["new_tokens"])
    ideal = predict(plan, hardware, load)
    rest_s = max(0.0, 1 / summary["decode_tok_s"]["median"] - ideal.decode.total_s)
    overhead_us = rest_s * 1e6 / ideal.decode.work.layers * min(1.0, hardware.devices_per_rank(plan.tp_size))
    hardware = hardware.model_copy(update={"per_layer_overhead_us": _short(overhead_us)})
    part = _short(_achieved(predict(plan, hardware, load), summary["ttft_s"]["median"]))
    return hardware.model_copy(update={"efficiency": Efficiency(matmul=part, attention=part, memory_read=1.0)})


def _achieved(ideal: Prediction, ttft_s: float) -> float:
    """The part of the matrix product's rate at which a prediction comes to ttft_s."""
    other_s = sum(phase.collective_s + phase.overhead_s for phase in ideal.first)
    compute_s = sum(phase.compute_s for phase in ideal.first)
    return min(1.0, max(LEAST_PART, compute_s / max(ttft_s - other_s, compute_s)))


def _measured(plan: Plan, summary: Figures) -> Hardware:
    """What needs no model: rates, the collective, memory. Overheads are none yet, and every rate is achieved."""
    on_cpu, ranks = summary["device"] == "cpu", plan.tp_size
    rates, reads = ([each["median"] for each in summary[key]] for key in ("matmul_gflop_s", "read_gb_s"))
    cores = min(summary["devices"], ranks * summary["threads"])  # that computed
    tflop_s = (sum(rates) / cores if on_cpu else min(rates)) / 1e3
    held = [pss["median"] - own for pss, own in zip(summary["pss_bytes"], summary["weight_bytes"], strict=True)]
    return Hardware(
        name=summary["machine"], source=f"measured by launch/bench.py: {_said(summary)}; the overhead and the achieved "
        "parts are those with which a prediction for that comes to what was measured",
        kind="cpu" if on_cpu else "accelerator", devices=summary["devices"],
        memory_gb=_short(summary["memory_bytes"] / 1e9), memory_read_gb_s=_short(sum(reads) if on_cpu else min(reads)),
        matmul_tflop_s=Tflops(**{plan.dtype: _short(tflop_s)}), efficiency=PERFECT,
        all_reduce=(_all_reduce(ranks, summary),) if ranks > 1 else (),
        per_layer_overhead_us=0.0, per_step_overhead_us=0.0, process_memory_gb=_short(max(0, *held) / 1e9))


def _said(summary: Figures) -> str:
    return (f"{summary['prompt_tokens']} prompt tokens, {summary['new_tokens']} new, {summary['dtype']}, weights "
            f"{summary['format']}, tp_size {summary['tp_size']}, medians of {summary['repeats']}")


def _all_reduce(ranks: int, summary: Figures) -> AllReduce:
    """The line through the all-reduce of a decode step and that of the prompt; where the smaller was no faster, all of
    the larger's time is its bytes'."""
    model = AllReduce(ranks=ranks, latency_us=0.0, bandwidth_gb_s=1.0)
    points = [(summary["collective_bytes"][name], summary["collective_us"][name]["median"])
              for name in ("all_reduce_decode", "all_reduce_prefill")]
    (small, small_us), (large, large_us) = points
    slope = (large_us - small_us) / (large - small) if large_us > small_us and large > small else large_us / large
    latency = max(0.0, small_us - slope * small)
    bandwidth = model.per_reduced_byte / slope / 1e3  # bytes/us are 1e-3 GB/s
    return AllReduce(ranks=ranks, latency_us=_short(latency), bandwidth_gb_s=_short(bandwidth))


def _short(value: float) -> float:
    """Four digits, as many as a noisy figure has at most."""
    return float(f"{value:.4g}")
