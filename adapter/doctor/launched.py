"""Checks of a job's config and of the environment that its launcher gave it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from adapter.doctor import machine
from adapter.doctor.check import Case, Finding, failed, ok, warning
from adapter.parallel import network
from adapter.parallel.cpu import usable_cores
from policies.errors import UserError

FIXED_BYTES = 700_000_000  # of a rank without weights: torch, DeepSpeed, Transformers
SPARE = 0.8  # share of the available memory beyond which a job may fit today and not tomorrow
IMAGE_PIXELS = 1_003_520  # of the largest image, where the config does not limit them


def plan(case: Case) -> Finding | None:
    """Can the checkpoint of --config be cut so, and are its files here?"""
    if case.config is None:
        return None
    from adapter.config.hub import described
    from adapter.planning.load import checked_plan

    model, parallel, form = case.config.model, case.config.tensor_parallel, case.config.weights.format
    tp_size = parallel.tp_size
    try:
        with described(model.path, model.revision) as directory:
            checked_plan(directory, tp_size, model.dtype, parallel.vision, form)
    except UserError as error:
        return failed(str(error), "see each line; `launch/plan.py --config C` has the whole plan")
    if case.place and case.place.world_size % tp_size:
        return failed(f"the job has {case.place.world_size} ranks, tensor_parallel.tp_size is {tp_size}",
                      f"deepspeed --num_accelerators {tp_size} ..., or tensor_parallel.tp_size={case.place.world_size}")
    return ok(f"{model.path} over {tp_size} ranks")


def memory(case: Case) -> Finding | None:
    """Do the shards of this host's ranks, their KV caches and what a rank takes without weights fit its memory?"""
    if case.config is None:
        return None
    from adapter.config.hub import described
    from adapter.planning.load import make_plan

    config = case.config
    with described(config.model.path, config.model.revision) as directory:
        plan, _, problems = make_plan(directory, config.tensor_parallel.tp_size, config.model.dtype,
                                      config.tensor_parallel.vision, config.weights.format)
    if problems:
        return None  # the row of the plan says it
    pixels, new = config.processor.max_pixels or IMAGE_PIXELS, config.generation.get("max_new_tokens", 256)
    side = plan.geometry.sizes["patch"] * plan.geometry.merge_side  # pixels of an image's token
    tokens = min(plan.geometry.context, pixels // side**2 + 256 + new)
    weights = max(plan.weight_bytes(r) for r in range(plan.tp_size))
    cache = max(plan.kv_bytes_per_token(r) for r in range(plan.tp_size)) * config.batch_size * tokens
    held = (f"{weights / 1e9:.2f} GB of weights, {cache / 1e9:.2f} GB of KV cache ({config.batch_size} requests x "
            f"{tokens} tokens)")
    if case.on_cpu:
        need, have = case.ranks * (weights + cache + FIXED_BYTES), machine.available_memory()
        found, where = f"{case.ranks} ranks here, each {held} and 0.7 GB", "host"
    else:
        cards = [card["bytes"] for card in case.facts("torch").get("cards", [])]
        need, have, found, where = weights + cache, min(cards, default=0), f"each rank: {held}", "card"
    found += f": {need / 1e9:.1f} GB of {have / 1e9:.1f} GB available on this {where}"
    do = "a larger tensor_parallel.tp_size over more hosts, model.dtype=bfloat16, a smaller batch_size or max_pixels"
    if not have or need <= SPARE * have:
        return ok(found) if have else None
    if need > have:
        return failed(found, f"{do}; or end what else uses it")
    return warning(found, f"watch it (a rank killed for memory ends the job); {do}")


def threads(case: Case) -> Finding | None:
    """Each rank's torch takes a thread for each core unless told otherwise, and ranks then fight for the cores."""
    if not case.on_cpu:
        return None
    usable, stated = usable_cores(), case.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    share = f"export OMP_NUM_THREADS={max(1, usable // case.ranks)}"
    if case.ranks > usable:
        return warning(f"{case.ranks} ranks on {usable} usable cores: right, but slow, and without DeepSpeed's "
                       "shared-memory op, which busy-waits",
                       f"start fewer ranks, or lift the container's CPU quota or the affinity; {share}")
    if case.ranks == 1:
        return ok(f"1 rank on {usable} usable cores")
    if not stated.isdigit() or not int(stated):
        what = f"OMP_NUM_THREADS={stated!r} is not a number of threads" if stated else "OMP_NUM_THREADS is not set"
        return warning(f"{what}: {case.ranks} ranks, each up to {usable} threads on {usable} cores", share)
    found = f"{case.ranks} ranks x {stated} threads on {usable} cores"
    return warning(found, share) if case.ranks * int(stated) > usable else ok(found)


def network_interfaces(case: Case) -> Finding | None:
    """Are the interfaces here that the environment names, and is there a way to MASTER_ADDR?"""
    if "error" in case.packages.get("psutil", {}):
        return None  # it lists the interfaces; the row imports says that it is broken
    have: dict[str, str] = {}
    for name, address in network.interfaces():
        have.setdefault(name, address)
    problems = [problem for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
                for problem in _named(variable, case, have)]
    host = case.environ.get("MASTER_ADDR", "")
    if case.several_hosts and host in network.LOOPBACK_NAMES:
        problems.append(f"MASTER_ADDR={host} is each host itself, which other hosts cannot reach")
    elif host:
        try:
            (network.interface_to if case.several_hosts else network.own_address_towards)(host)
        except UserError as error:
            problems.append(str(error))
    if problems:
        useful = [name for name, own in have.items() if not own.startswith("127.")]
        return failed("; ".join(problems), f"name one of {', '.join(useful or have)}, or unset it; deepspeed "
                      "--master_addr <the first host's address in the network they share>")
    return ok(", ".join(f"{name} {own}" for name, own in have.items()))


def _named(variable: str, case: Case, have: dict[str, str]) -> Iterator[str]:
    """What is wrong with an interface variable. gloo takes names; NCCL beginnings of names, =name, or ^not."""
    stated = case.environ.get(variable, "")
    exact = variable.startswith("GLOO") or stated.startswith("=")
    for name in [] if stated.startswith("^") else filter(None, stated.removeprefix("=").split(",")):
        found = [own for h, own in have.items() if (h == name if exact else h.startswith(name.partition(":")[0]))]
        if not found:
            yield f"{variable}={stated}: no interface {name} here"
        elif case.several_hosts and all(own.startswith("127.") for own in found):
            yield f"{variable}={stated} in a job of several hosts: none of them reaches the others"


def master_port(case: Case) -> Finding | None:
    """Rank 0 listens on MASTER_PORT; DeepSpeed's default is 29500 for every job of a host."""
    environ = case.environ
    stated = environ.get("MASTER_PORT", "29500")
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or (case.place and case.place.rank > 0):
        return None  # torchrun itself listens there; or another host does
    do = "deepspeed --master_port <a free one between 1024 and 65535>; torchrun --master-port, too"
    if not stated.isdigit() or not 0 < int(stated) < 65536:
        return failed(f"MASTER_PORT={stated!r} is not a port", do)
    try:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("" if case.several_hosts else "127.0.0.1", int(stated)))
            s.listen(1)
    except OSError as error:
        found = f"port {stated} cannot be used ({error.strerror}); is another job running?"
        return failed(found, do) if "MASTER_PORT" in environ else warning(f"DeepSpeed's default {found}", do)
    return ok(f"{stated} is free")


LAUNCHED = (plan, memory, threads, network_interfaces, master_port)
