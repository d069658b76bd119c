"""What a machine can do, as a YAML file of configs/hardware/ states it, and what one of n ranks gets of it.

Strict as adapter.config.schema: an unknown key, or a number that cannot be, is an error. Every key has its unit in its
name; GB and TFLOP are powers of ten. To write one: yaml.safe_dump(hardware.model_dump(mode="json", exclude_none=True)).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic import field_validator as check

from adapter.config.load import load_section
from adapter.config.schema import Count, Listed, Section, Text
from policies.errors import UserError

Amount = Annotated[float, Field(gt=1e-9, le=1e9)]
Time = Annotated[float, Field(ge=0, le=1e9)]
Part = Annotated[float, Field(gt=0, le=1)]


class AllReduce(Section):
    """The alpha-beta model of a collective between `ranks` ranks: a fixed time, and one that grows with the bytes.

    Ring all-reduce of b bytes: latency + 2 (n-1)/n b / bandwidth; all-gather of b bytes in all: latency + (n-1)/n b /
    bandwidth (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005). So
    bandwidth_gb_s is what nccl-tests calls bus bandwidth, doc/PERFORMANCE.md there.
    """

    ranks: Annotated[int, Field(ge=2, le=4096)]
    latency_us: Time
    bandwidth_gb_s: Amount

    @property
    def per_reduced_byte(self) -> float:
        return 2 * (self.ranks - 1) / self.ranks

    @property
    def per_gathered_byte(self) -> float:
        return (self.ranks - 1) / self.ranks

    def seconds(self, calls: int, moved_bytes: float) -> float:
        """Seconds of `calls` collectives in which a rank sends `moved_bytes` in all."""
        return calls * self.latency_us * 1e-6 + moved_bytes / (self.bandwidth_gb_s * 1e9)


def _ascending(entries: tuple[AllReduce, ...]) -> tuple[AllReduce, ...]:
    if any(a.ranks >= b.ranks for a, b in pairwise(entries)):
        raise ValueError(f"ranks must ascend, each number once; here: {[e.ranks for e in entries]}")
    return entries


class Tflops(Section):
    """TFLOP/s of one device's dense matrix product, by the dtype of its operands."""

    bfloat16: Amount | None = None
    float16: Amount | None = None
    float32: Amount | None = None


class Efficiency(Section):
    """The part of matmul_tflop_s and memory_read_gb_s that this project's kernels reach: 1 where those were measured
    with them, and stated openly where those are a data sheet's."""

    matmul: Part  # linear layers over the rows of a prompt
    attention: Part  # scores, and their product with the values
    memory_read: Part  # weights and KV cache in a decode step


class Hardware(Section):
    """One host.

    kind: "accelerator": every device has a memory of its own, and a rank uses one device. "cpu": devices are cores, all
    on one memory, and n ranks divide the cores (OMP_NUM_THREADS = cores / ranks). Ranks beyond `devices` share them.
    memory_gb, memory_read_gb_s: of one memory: a device's, or that of the whole host with all its cores reading.
    all_reduce: ascending by ranks; between entries is interpolated. per_layer_overhead_us: what a layer takes however
    little it computes (kernel launches, Python), per_step_overhead_us the same around the layers of a forward.
    process_memory_gb: what a rank holds beside weights, KV cache and activations.
    """

    name: Text
    source: Text  # where the numbers come from: a data sheet, or the command that measured them
    kind: Literal["accelerator", "cpu"]
    devices: Count
    memory_gb: Amount
    memory_read_gb_s: Amount
    matmul_tflop_s: Tflops
    efficiency: Efficiency
    all_reduce: Annotated[tuple[AllReduce, ...], Listed, AfterValidator(_ascending)] = ()
    per_layer_overhead_us: Time
    per_step_overhead_us: Time
    process_memory_gb: Time

    @check("matmul_tflop_s")
    @classmethod
    def _some(cls, rates: Tflops) -> Tflops:
        if not rates.model_dump(exclude_none=True):
            raise ValueError(f"at least one of {', '.join(Tflops.model_fields)} is needed")
        return rates

    def devices_per_rank(self, ranks: int) -> float:
        """Devices that one of `ranks` ranks computes on; of the rank with the least, where they do not divide."""
        return self.devices / ranks if self.kind == "cpu" else 1 / -(-ranks // self.devices)

    def ranks_per_memory(self, ranks: int) -> int:
        return ranks if self.kind == "cpu" else -(-ranks // self.devices)

    def read_gb_s(self, ranks: int) -> float:
        """GB/s that one of `ranks` ranks reads while all read."""
        return self.memory_read_gb_s * self.efficiency.memory_read / self.ranks_per_memory(ranks)

    def tflop_s(self, dtype: str) -> float:
        """Raises UserError where the file has no figure for this dtype."""
        rate: float | None = getattr(self.matmul_tflop_s, dtype, None)
        if rate is None:
            known = ", ".join(self.matmul_tflop_s.model_dump(exclude_none=True))
            raise UserError(f"hardware {self.name!r} has no matmul_tflop_s.{dtype}, which model.dtype {dtype} needs; "
                            f"give it, or predict with model.dtype={known.split(', ')[0]} (known: {known})")
        return rate

    def collective(self, ranks: int) -> AllReduce:
        """The entry for `ranks`, or the line between its neighbours; below the first entry that, and above the last its
        bandwidth with a latency that grows as the steps of a ring do. Raises UserError where there is no entry."""
        entries = self.all_reduce
        if not entries:
            raise UserError(f"hardware {self.name!r} has no all_reduce, which {ranks} ranks need; give at least one "
                            "entry {ranks: ..., latency_us: ..., bandwidth_gb_s: ...}")
        for low, high in pairwise(entries):
            if low.ranks <= ranks <= high.ranks:
                at = (ranks - low.ranks) / (high.ranks - low.ranks)
                return AllReduce(ranks=ranks, latency_us=low.latency_us + at * (high.latency_us - low.latency_us),
                                 bandwidth_gb_s=low.bandwidth_gb_s + at * (high.bandwidth_gb_s - low.bandwidth_gb_s))
        nearest = entries[0] if ranks < entries[0].ranks else entries[-1]
        steps = max(1.0, (ranks - 1) / (nearest.ranks - 1))
        return AllReduce(ranks=ranks, latency_us=nearest.latency_us * steps, bandwidth_gb_s=nearest.bandwidth_gb_s)

    def sharing(self, ranks: int) -> Iterator[str]:
        """In words, what one rank has of the machine."""
        each, what = self.devices_per_rank(ranks), "core" if self.kind == "cpu" else "device"
        if each < 1:
            yield (f"{ranks} ranks on {self.devices} {what}s: a rank has {each:.3g} of a {what}'s compute, and its "
                   "overhead takes as much longer")
        elif self.kind == "cpu":
            yield f"a rank computes on {each:.3g} of {self.devices} cores"
        if (readers := self.ranks_per_memory(ranks)) > 1:
            yield f"{readers} ranks share one memory: each reads with 1/{readers} of its bandwidth"
        if ranks > 1 and ranks not in [entry.ranks for entry in self.all_reduce]:
            yield f"all_reduce has no entry for {ranks} ranks: its figures are derived from the nearest entries"


def load_hardware(path: str | Path) -> Hardware:
    """Raises UserError with every problem of the file."""
    return load_section(Hardware, path, "name: ..., see configs/hardware/")
