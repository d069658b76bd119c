"""What a machine can do, as a YAML file of configs/hardware/ states it, and what one of n ranks gets of it.

Strict as adapter.config.schema: an unknown key, or a number that cannot be, is an error. Every key has its unit in its
name; GB and TFLOP are powers of ten. To write one: yaml.safe_dump(hardware.model_dump(mode="json")).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from adapter.config.load import load_section
from adapter.config.schema import Count, Listed, Section, Text
from policies.errors import UserError

Amount = Annotated[float, Field(gt=1e-9, le=1e9)]
Time = Annotated[float, Field(ge=0, le=1e9)]
Part = Annotated[float, Field(gt=0, le=1)]


class AllReduce(Section):
    """The alpha-beta model of a collective between `ranks` ranks: a fixed time, and one that grows with the bytes.
    bandwidth_gb_s is what nccl-tests calls bus bandwidth, doc/PERFORMANCE.md there."""

    ranks: Annotated[int, Field(ge=2, le=4096)]
    latency_us: Time
    bandwidth_gb_s: Amount


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
    matmul_tflop_s: of one device's dense matrix product, by the dtype of its operands. all_reduce: an entry serves as
    many ranks as it states, and fewer where they have none; the largest serves all beyond it. per_layer_overhead_us:
    what a layer takes however little it computes (kernel launches, Python), per_step_overhead_us the same around the
    layers of a forward. process_memory_gb: what a rank holds beside weights, KV cache and activations.
    """

    name: Text
    source: Text  # where the numbers come from: a data sheet, or the command that measured them
    kind: Literal["accelerator", "cpu"]
    devices: Count
    memory_gb: Amount
    memory_read_gb_s: Amount
    matmul_tflop_s: dict[Literal["bfloat16", "float16", "float32"], Amount]
    efficiency: Efficiency
    all_reduce: Annotated[tuple[AllReduce, ...], Listed] = ()
    per_layer_overhead_us: Time
    per_step_overhead_us: Time
    process_memory_gb: Time

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
        rates = {str(name): rate for name, rate in self.matmul_tflop_s.items()}
        if dtype not in rates:
            raise UserError(f"hardware {self.name!r} has no matmul_tflop_s.{dtype}, which model.dtype {dtype} needs; "
                            f"give it, or predict with another model.dtype (known: {', '.join(rates) or 'none'})")
        return rates[dtype]

    def collective(self, ranks: int) -> AllReduce:
        """The entry for `ranks`, or else that of the next more, or the largest. Raises UserError where there is none.
        """
        if not self.all_reduce:
            raise UserError(f"hardware {self.name!r} has no all_reduce, which {ranks} ranks need; give at least one "
                            "entry {ranks: ..., latency_us: ..., bandwidth_gb_s: ...}")
        enough = [entry for entry in self.all_reduce if entry.ranks >= ranks]
        return min(enough, key=lambda e: e.ranks) if enough else max(self.all_reduce, key=lambda e: e.ranks)

    def collective_s(self, ranks: int, calls: int, sent_bytes: float) -> float:
        """Seconds of `calls` collectives in which a rank sends `sent_bytes` in all."""
        if not calls:
            return 0.0
        entry = self.collective(ranks)
        return calls * entry.latency_us * 1e-6 + sent_bytes / (entry.bandwidth_gb_s * 1e9)

    def sharing(self, ranks: int) -> Iterator[str]:
        """In words, what one rank has of the machine."""
        each, what = self.devices_per_rank(ranks), "core" if self.kind == "cpu" else "device"
        if each < 1:
            yield (f"{ranks} ranks on {self.devices} {what}s: a rank has {each:.3g} of a {what}'s compute, and its "
                   "overhead takes as much longer")
        if (readers := self.ranks_per_memory(ranks)) > 1:
            yield f"{readers} ranks share one memory: each reads with 1/{readers} of its bandwidth"
        if ranks > 1 and (entry := self.collective(ranks)).ranks != ranks:
            yield f"all_reduce has no entry for {ranks} ranks: that for {entry.ranks} stands in"


def load_hardware(path: str | Path) -> Hardware:
    """Raises UserError with every problem of the file."""
    return load_section(Hardware, path, "name: ..., see configs/hardware/")
