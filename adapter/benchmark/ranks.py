"""What the ranks of one job measure of themselves: a record of the start, and a record of each repeat."""

from __future__ import annotations

import argparse
import logging
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.benchmark.limits import Machine, Paused, decode_bytes, everyone, prefill_flop
from adapter.benchmark.operators import operators
from adapter.benchmark.peers.peer import ENDLESS, WARM_UP_TOKENS, memory, speed
from adapter.benchmark.request import first_request, make_processor
from adapter.benchmark.vision import both_modes
from adapter.commands import common
from adapter.config.schema import Config
from adapter.engine import init_inference
from adapter.health.watchdog import watching
from adapter.kernels import malloc
from adapter.parallel.cpu import usable_cores
from adapter.parallel.group import to_device
from adapter.parallel.launchers import read_environment
from adapter.planning.cost_model import Workload
from adapter.planning.plan import Plan
from adapter.requests.batching import Clock, Limits, generate, rank_facts, share
from adapter.requests.processing import collate
from policies.errors import UserError
from policies.rules import Head

log = logging.getLogger("adapter")
Record = dict[str, Any]
Inputs = dict[str, Tensor]
CALLS = 20  # of a collective, of which the median counts


@dataclass(frozen=True)
class Job:
    """One rank's part of the job. one: the inputs of the request; many: of `--requests-at-once` of it."""

    engine: deepspeed.InferenceEngine
    config: Config
    one: Inputs
    many: Inputs

    @property
    def plan(self) -> Plan:
        plan: Plan = self.engine.plan
        return plan

    @property
    def tokens(self) -> int:
        return self.one["input_ids"].shape[1]

    @property
    def load(self) -> Workload:
        """The request as adapter.planning.cost_model counts it: two frames of a video are one image."""
        grids = [row for name, grid in self.one.items() if name.endswith("_grid_thw") for row in grid.tolist()]
        patches = tuple(height * width for times, height, width in grids for _ in range(times))
        return Workload(self.tokens, patches)

    def run(self, inputs: Inputs, new: int, clock: Clock | None = None) -> dict[str, float]:
        """Generate `new` tokens, greedily, and say how fast by that clock; the figures are those of rank 0."""
        limits = Limits.of(self.config, self.plan.geometry.context, self.engine.module.generation_config)
        exactly = replace(limits, arguments=limits.arguments | {"max_new_tokens": new, **ENDLESS})
        clock = clock or Clock()
        self.engine.mpu.world.barrier()
        began = time.perf_counter()
        generate(inputs, self.engine.generate, exactly, clock)
        return speed(began, clock.times[1:])  # the first is the prompt


def measure(config: Config, plan: Plan, args: argparse.Namespace, write: Callable[[Record], None]) -> int:
    """Every rank of the job must call it. `write` gets the rows, on rank 0. Raises UserError."""
    launch = read_environment()
    if launch.world_size > plan.tp_size:
        raise UserError(f"bench times one replica, over tp_size {plan.tp_size} ranks, and this job has "
                        f"{launch.world_size}; start `deepspeed --num_accelerators {plan.tp_size} ...`")
    one, many = _inputs(config, plan, args) if launch.rank == 0 else ({}, {})
    began = time.perf_counter()
    engine = init_inference(config)
    load_s = time.perf_counter() - began
    malloc.keep()
    tp, first = engine.mpu.tp, launch.rank == 0
    with watching(engine.mpu, heartbeat_s=config.tensor_parallel.heartbeat_s):
        job = Job(engine, config, share(one, tp), share(many, tp))
        row = _started(job, load_s) | {"case": _case(job, args)}
        if first:
            log.info("loaded in %.2f s", row["load_s"])
            write({"engine": "ours", "repeat": 0, **row})
        machine = Machine(engine.mpu.world, config.model.torch_dtype)
        job.run(job.many, WARM_UP_TOKENS)
        for repeat in range(args.repeats):
            row = _repeated(job, machine, args)
            if args.profile:
                row["profile"] = operators(partial(job.run, job.one))
            if first:
                log.info("repeat %d of %d: first token %.3f s, %.2f tokens/s, %d at once %.2f tokens/s", repeat + 1,
                         args.repeats, row["ttft_s"], row["decode_tok_s"], args.requests_at_once,
                         row["at_once"]["decode_tok_s"])
                write({"engine": "ours", "repeat": repeat, **row})
    return common.DONE


def _inputs(config: Config, plan: Plan, args: argparse.Namespace) -> tuple[Inputs, Inputs]:
    """Before the ranks join, so that a request that cannot be prepared is reported at once."""
    processor = make_processor(config, plan.geometry.context, args.new)
    prepared = processor.prepare(first_request(config))
    return prepared.tensors, collate([prepared] * args.requests_at_once, processor.pad_token_id)


def _started(job: Job, load_s: float) -> Record:
    """Loading, memory after it, and the first request, before the machine is measured: its buffers are no part of the
    product."""
    rows = everyone(job.engine.mpu.world, [load_s, *memory().values()])
    cold = job.run(job.one, WARM_UP_TOKENS)
    facts = rank_facts(job.engine)
    cards = [fact["device_peak_bytes"] for fact in facts if "device_peak_bytes" in fact]
    of_ranks = {name: [int(row[1 + place]) for row in rows] for place, name in enumerate(memory())}
    return {
        "load_s": round(max(row[0] for row in rows), 4), "read_s": round(max(fact["load_s"] for fact in facts), 4),
        "bytes_read": sum(fact["bytes_read"] for fact in facts), **of_ranks,
        "pss_per_weight_byte": [round(pss / fact["weight_bytes"], 4)
                                for pss, fact in zip(of_ranks["pss_bytes"], facts, strict=True)],
        "cold_ttft_s": cold["ttft_s"], **({"device_peak_bytes": cards} if cards else {}),
    }


def _case(job: Job, args: argparse.Namespace) -> Record:
    """What is the same in every repeat."""
    ranks = range(job.plan.tp_size)
    return {
        "tp_size": job.plan.tp_size, "dtype": job.plan.dtype, "format": job.plan.form.name,
        "prompt_tokens": job.tokens, "patches": list(job.load.patches),
        "new_tokens": args.new, "requests_at_once": args.requests_at_once, "threads": torch.get_num_threads(),
        "device": get_accelerator().device_name(), **_machine(job.plan),
        "all_reduce": job.engine.mpu.tp.route.name, "vision": job.plan.vision,
        "weight_bytes": [job.plan.weight_bytes(rank) for rank in ranks],
        "decode_bytes": [decode_bytes(job.plan, rank) for rank in ranks],
        "prefill_flop": [prefill_flop(job.plan, job.load, rank) for rank in ranks],
        "collective_bytes": {name: x.nbytes for name, (_, x) in _collectives(job).items()},
    }


def _machine(plan: Plan) -> Record:
    """Devices as adapter.planning.hardware counts them, and bytes of one of their memories."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator.device_name()
        return {"machine": f"{name} x {plan.tp_size}", "devices": plan.tp_size,
                "memory_bytes": accelerator.total_memory()}
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = usable_cores()
    return {"machine": f"{model[1] if model else platform.machine()}, {cores} cores", "devices": cores,
            "memory_bytes": psutil.virtual_memory().total}


def _repeated(job: Job, machine: Machine, args: argparse.Namespace) -> Record:
    """One repeat: the request alone, beside what the machine allowed meanwhile, then many of it at once."""
    def timed(inputs: Inputs) -> Record:
        clock = Paused(machine)
        return {**job.run(inputs, args.new, clock), **clock.figures()}

    one, many, plan = timed(job.one), timed(job.many), job.plan
    reading = [decode_bytes(plan, rank) / (gb_s * 1e9) for rank, gb_s in enumerate(one["read_gb_s"])]
    products = [prefill_flop(plan, job.load, rank) / (gflop_s * 1e9)
                for rank, gflop_s in enumerate(one["matmul_gflop_s"])]
    total = many["decode_tok_s"] * args.requests_at_once
    many |= {"decode_tok_s": round(total, 4), "times_one": round(total / one["decode_tok_s"], 4)}
    vision_s = both_modes(job.engine)
    return {
        **one, "read_share": [round(seconds * one["decode_tok_s"], 4) for seconds in reading],
        "limit_ttft_s": round(max(products), 4), "limit_decode_tok_s": round(1 / max(reading), 4), "at_once": many,
        "collective_us": _collective_us(job), **({"vision_s": vision_s} if vision_s else {}),
    }


def _collectives(job: Job) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Name -> the group's own call, and what one rank puts into it. None over one rank."""
    plan, tp = job.plan, job.engine.mpu.tp
    if tp.size == 1:
        return {}
    sizes, dtype = plan.geometry.sizes, job.config.model.torch_dtype
    head = next(claim for claim in plan.claims.values() if isinstance(claim.rule, Head))
    rows = tuple(stop - start for start, stop in plan.splits[head.rule.axis(head.weight)].ranges)

    def zeros(*shape: int) -> Tensor:
        return to_device(torch.zeros(shape, dtype=dtype))

    return {
        "all_reduce_decode": (tp.all_reduce, zeros(1, sizes["hidden"])),
        "all_reduce_prefill": (tp.all_reduce, zeros(job.tokens, sizes["hidden"])),
        "all_gather_logits": (lambda x: tp.all_gather_last(x, rows), zeros(1, rows[tp.rank])),
    }


def _collective_us(job: Job) -> dict[str, float]:
    """Microseconds of each collective on this rank: the median of CALLS calls one after another."""
    found = {}
    for name, (call, x) in _collectives(job).items():
        job.engine.mpu.world.barrier()
        took = []
        for _ in range(CALLS):
            began = time.perf_counter()
            call(x)
            get_accelerator().synchronize()
            took.append((time.perf_counter() - began) * 1e6)
        found[name] = round(median(took), 2)
    return found
