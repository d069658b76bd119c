"""What the ranks of one job measure of themselves: a record of the start, and a record of each repeat."""

from __future__ import annotations

import argparse
import logging
import platform
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import deepspeed
import psutil
import safetensors.torch
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.benchmark.limits import decode_bytes, prefill_flop, rates
from adapter.benchmark.parts import both_modes, collective_us, operators
from adapter.benchmark.peers.peer import ENDLESS, WARM_UP_TOKENS, speed
from adapter.benchmark.request import first_request, images_of
from adapter.commands import common
from adapter.config.schema import Config
from adapter.engine import init_inference
from adapter.health.watchdog import watching
from adapter.kernels import malloc
from adapter.parallel.cpu import usable_cores
from adapter.parallel.group import exchange
from adapter.parallel.launchers import read_environment
from adapter.planning.cost_model import Workload
from adapter.planning.plan import Plan
from adapter.requests.batching import Clock, Limits, generate, proportional_set_size, room, share
from adapter.requests.processing import RequestProcessor, collate
from policies.errors import UserError

log = logging.getLogger("adapter")
Record = dict[str, Any]
Inputs = dict[str, Tensor]


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
    def load(self) -> Workload:
        """The request as adapter.planning.cost_model counts it: two frames of a video are one image."""
        grids = [row for name, grid in self.one.items() if name.endswith("_grid_thw") for row in grid.tolist()]
        patches = tuple(height * width for times, height, width in grids for _ in range(times))
        return Workload(self.one["input_ids"].shape[1], patches)

    def run(self, inputs: Inputs, new: int) -> dict[str, float]:
        """Generate `new` tokens, greedily, and say how fast; the figures are those of rank 0."""
        limits = Limits.of(self.config, self.plan.geometry.context, self.engine.module.generation_config)
        exactly = replace(limits, arguments=limits.arguments | {"max_new_tokens": new, **ENDLESS})
        clock = Clock()
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
    with watching(engine.mpu, heartbeat_s=config.tensor_parallel.heartbeat_s):
        job = Job(engine, config, share(one, engine.mpu.tp), share(many, engine.mpu.tp))
        row = _started(job, load_s) | {"case": _case(job, args)}
        if launch.rank == 0:
            log.info("loaded in %.2f s", row["load_s"])
            write({"engine": "ours", "repeat": 0, **row})
        job.run(job.many, WARM_UP_TOKENS)
        for repeat in range(args.repeats):
            row = _repeated(job, args)
            if launch.rank == 0:
                log.info("repeat %d of %d: first token %.3f s, %.2f tokens/s, %d at once %.2f tokens/s", repeat + 1,
                         args.repeats, row["ttft_s"], row["decode_tok_s"], args.requests_at_once,
                         row["at_once"]["decode_tok_s"])
                write({"engine": "ours", "repeat": repeat, **row})
    return common.DONE


def _inputs(config: Config, plan: Plan, args: argparse.Namespace) -> tuple[Inputs, Inputs]:
    """Before the ranks join, so that a request that cannot be prepared is reported at once. With --inputs-into they are
    written down for the peers: what the model's forward takes, and the images before any resizing."""
    context = room(config, plan.geometry.context)
    if context <= args.new:
        raise UserError(f"--new {args.new}: prompt and answer together have {context} tokens of room")
    request = first_request(config)
    processor = RequestProcessor(config.model.path, config.processor, context - args.new)
    prepared = processor.prepare(request)
    if args.inputs_into:
        safetensors.torch.save_file(prepared.tensors | images_of(request), args.inputs_into)
    return prepared.tensors, collate([prepared] * args.requests_at_once, processor.pad_token_id)


def _started(job: Job, load_s: float) -> Record:
    """Loading, memory after it, and the first request."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = {"load_s": load_s, "pss_bytes": proportional_set_size(), "peak_rss_bytes": peak}
    ranks = exchange(job.engine.mpu.world, own)
    cold = job.run(job.one, WARM_UP_TOKENS)
    return {"load_s": round(max(row["load_s"] for row in ranks), 4), "cold_ttft_s": cold["ttft_s"],
            **{name: [row[name] for row in ranks] for name in ("pss_bytes", "peak_rss_bytes")}}


def _case(job: Job, args: argparse.Namespace) -> Record:
    """What is the same in every repeat."""
    plan = job.plan
    return {
        "tp_size": plan.tp_size, "dtype": plan.dtype, "format": plan.form.name, "vision": plan.vision,
        "prompt_tokens": job.load.prompt_tokens, "patches": list(job.load.patches), "new_tokens": args.new,
        "requests_at_once": args.requests_at_once, "all_reduce": job.engine.mpu.tp.route.name,
        "threads": torch.get_num_threads(), "device": get_accelerator().device_name(), **_machine(plan),
        "weight_bytes": [plan.weight_bytes(rank) for rank in range(plan.tp_size)],
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


def _repeated(job: Job, args: argparse.Namespace) -> Record:
    """One repeat: the request alone, between two looks at what the machine allows, then many of it at once."""
    plan, world, dtype = job.plan, job.engine.mpu.world, job.config.model.torch_dtype
    looks = [rates(world, dtype)]
    one = job.run(job.one, args.new)
    looks.append(rates(world, dtype))
    many = job.run(job.many, args.new)
    read, product = ([round(mean(look[rank][name] for look in looks), 3) for rank in range(world.size)]
                     for name in ("read_gb_s", "matmul_gflop_s"))
    reading_s = [decode_bytes(plan, rank) / (gb_s * 1e9) for rank, gb_s in enumerate(read)]
    products_s = [prefill_flop(plan, job.load, rank) / (gflop_s * 1e9) for rank, gflop_s in enumerate(product)]
    row = {
        **one, "read_gb_s": read, "matmul_gflop_s": product,
        "read_share": [round(seconds * one["decode_tok_s"], 4) for seconds in reading_s],
        "limit_ttft_s": round(max(products_s), 4), "limit_decode_tok_s": round(1 / max(reading_s), 4),
        "at_once": many | {"decode_tok_s": round(many["decode_tok_s"] * args.requests_at_once, 4)},
        **collective_us(job.engine, job.load.prompt_tokens), **both_modes(job.engine),
    }
    return row | ({"profile": operators(partial(job.run, job.one))} if args.profile else {})
