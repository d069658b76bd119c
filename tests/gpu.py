"""The jobs of tests/gpu.sh: each starts the project's own commands on N ranks and is one line of the table."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from launching import ROOT, Job, Outcome

DEMO = ROOT / "configs" / "demo_tp4.yaml"
LIMIT_S = 900.0  # after which a job has failed
END_S = 60.0  # within which a job ends when one of its ranks is killed


class Failed(Exception):
    """A job did not show what it must; says why in one line."""


class DoesNotApply(Exception):
    """This machine cannot run the job; says why in one line."""


@dataclass(frozen=True)
class Machine:
    """ranks: as many as the jobs start. name: of the cards, or the processor. dtypes: those DeepSpeed computes in."""

    ranks: int
    device: str
    name: str
    dtypes: tuple[str, ...]

    @property
    def has_cards(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Line:
    """One line of the table. result: "passed", "FAILED" or "does not apply"."""

    job: str
    ranks: int
    result: str
    what: str
    seconds: float

    def markdown(self) -> str:
        return f"| {self.job} | {self.ranks} | {self.result} | {self.what.replace('|', '/')} | {self.seconds:.0f} |"


def run(command: str, ranks: int, *arguments: str, launcher: str = "deepspeed") -> tuple[list[dict], Outcome]:
    """The rows that a command wrote as JSON lines. Raises Failed where it did not end with 0 or left something."""
    job = Job(ranks, ROOT / "launch" / f"{command}.py", "--config", str(DEMO), *arguments, launcher=launcher)
    try:
        outcome = job.finish(LIMIT_S)
    except AssertionError as error:
        raise Failed(str(error).splitlines()[0]) from None
    if outcome.code != 0:
        print(outcome.err[-6000:], file=sys.stderr)
        reported = [line for line in outcome.err.splitlines() if line.startswith("error")]
        raise Failed(f"exit code {outcome.code}: {(reported or ['no message'])[0]}")
    if left := job.leftovers():
        raise Failed(f"left behind: {', '.join(left)}")
    return [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")], outcome


def verify(ranks: int, dtype: str, *overrides: str) -> str:
    rows, _ = run("verify", ranks, "--dtype", dtype, f"tensor_parallel.tp_size={ranks}", *overrides)
    found = rows[-1]
    match = found["greedy_match"]
    return (f"logits within {found['max_abs_logit_diff']:.1e}, {match['equal']} of {match['of']} tokens equal, "
            f"{found['largest_share_of_bound']:.2g} of the bound{_memory(found)}")


def _memory(summary: dict) -> str:
    cards = [rank["device_peak_bytes"] for rank in summary["ranks"] if "device_peak_bytes" in rank]
    return f", {max(cards) / 1e6:.0f} MB of a card" if cards else ""


def replicas(machine: Machine, requests: str) -> str:
    if machine.ranks < 2:
        raise DoesNotApply("one rank makes one replica")
    tp_size = machine.ranks // 2 if machine.ranks % 2 == 0 else 1
    rows, _ = run("generate", machine.ranks, f"tensor_parallel.tp_size={tp_size}", "batch_size=1", requests)
    used = {rank["replica"] for rank in rows[-1]["ranks"]}
    if len(used) != machine.ranks // tp_size:
        raise Failed(f"{len(used)} replicas instead of {machine.ranks // tp_size}")
    return f"{len(used)} replicas of {tp_size}: {rows[-1]['answered']} answers, all as expected{_memory(rows[-1])}"


def flash(machine: Machine, requests: str) -> str:
    if not machine.has_cards:
        raise DoesNotApply("flash_attention_2 is for GPUs")
    if importlib.util.find_spec("flash_attn") is None:
        raise DoesNotApply("flash-attn is not installed")
    return verify(machine.ranks, "bfloat16", "model.attn_implementation=flash_attention_2", requests)


def graphs(machine: Machine, requests: str) -> str:
    arguments = f"tensor_parallel.tp_size={machine.ranks}", "generation.max_new_tokens=32", requests
    rows, speed = {}, {}
    for graphed in (False, True):
        key = f"deepspeed.enable_cuda_graph={str(graphed).lower()}"
        found, outcome = run("generate", machine.ranks, key, "batch_size=1", *arguments)
        rows[graphed] = [row["tokens"] for row in found[:-1]]
        speed[graphed] = [row["decode_tok_s"] for row in found[:-1] if row["decode_tok_s"]]
    if rows[False] != rows[True]:
        raise Failed("tokens differ with graphs and without")
    if not machine.has_cards:
        if "a CPU has no graphs" not in outcome.err:
            raise Failed("a CPU ran enable_cuda_graph without a warning")
        return "the same tokens; a CPU has no graphs, both ran operator by operator"
    figures = ", ".join(f"{max(speed[on])} {'with' if on else 'without'}" for on in (False, True) if speed[on])
    return f"the same tokens; tokens/s: {figures}"


def killed_rank(machine: Machine, requests: str) -> str:
    if machine.ranks < 2:
        raise DoesNotApply("one rank has nobody who waits for it")
    job = Job(machine.ranks, ROOT / "launch" / "generate.py", "--config", str(DEMO), requests, "batch_size=1",
              f"tensor_parallel.tp_size={machine.ranks}", "generation={max_new_tokens: 30000, min_new_tokens: 30000}",
              launcher="deepspeed")
    try:
        deadline = time.monotonic() + LIMIT_S
        while "generating" not in job.output():
            if time.monotonic() > deadline or job.process.poll() is not None:
                raise Failed("the job never began to generate")
            time.sleep(0.2)
        time.sleep(1)
        os.kill(job.rank_pid(1), signal.SIGKILL)
        killed = time.monotonic()
        outcome = job.finish(END_S)
        seconds = time.monotonic() - killed
        if outcome.code == 0 or "rank 1" not in outcome.err:
            raise Failed(f"exit code {outcome.code}, and rank 1 is not named")
        if left := job.leftovers():
            raise Failed(f"left behind: {', '.join(left)}")
    except AssertionError as error:
        raise Failed(str(error).splitlines()[0]) from None
    finally:
        job.kill_all()
    return f"the job ended {seconds:.1f} s after the kill, named rank 1 and left nothing"


def bench(machine: Machine, requests: str) -> str:
    rows, _ = run("bench", 1, "--against", "hf", "--repeats", "1", "--new", "16", "--requests-at-once", "2",
                  f"tensor_parallel.tp_size={machine.ranks}", requests, launcher="none")
    ours, theirs = rows[-1], rows[-1]["peers"]["hf"]
    return ", ".join(f"{name}: first token {found['ttft_s']['median']:.3g} s, {found['decode_tok_s']['median']:.3g} "
                     "tokens/s" for name, found in (("ours", ours), ("Transformers", theirs)))


def jobs(machine: Machine, requests: str) -> Iterator[tuple[str, int, Callable[[], str]]]:
    """(name, ranks, job) of every line. A job returns what it showed, or raises Failed or DoesNotApply."""
    n = machine.ranks
    for tp in range(1, n + 1):
        yield f"parity in float32, tp {tp}", tp, lambda tp=tp: verify(tp, "float32", requests)
    yield "replicas", n, lambda: replicas(machine, requests)
    for dtype in ("bfloat16", "float16"):
        yield f"verify in {dtype}", n, lambda dtype=dtype: half_precision(machine, dtype, requests)
    yield "flash_attention_2", n, lambda: flash(machine, requests)
    yield "graphs against no graphs", n, lambda: graphs(machine, requests)
    yield "a killed rank", n, lambda: killed_rank(machine, requests)
    yield "bench against Transformers", n, lambda: bench(machine, requests)


def half_precision(machine: Machine, dtype: str, requests: str) -> str:
    if dtype not in machine.dtypes:
        raise DoesNotApply(f"DeepSpeed on this {machine.device} computes in {', '.join(machine.dtypes)}")
    return verify(machine.ranks, dtype, requests)


def outcome_of(job: str, ranks: int, call: Callable[[], str]) -> Line:
    """Run one job. Whatever it raises is a line: a bug of this file must not hide the lines after it."""
    began, result = time.monotonic(), "passed"
    try:
        what = call()
    except DoesNotApply as reason:
        result, what = "does not apply", str(reason)
    except Failed as reason:
        result, what = "FAILED", str(reason)
    except Exception as error:
        result, what = "FAILED", f"{type(error).__name__}: {error}"
    line = Line(job, ranks, result, what, time.monotonic() - began)
    print(line.markdown(), file=sys.stderr, flush=True)
    return line


def table(machine: Machine, lines: list[Line]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    head = [f"{time.strftime('%Y-%m-%d', time.gmtime())}, {machine.name}, {versions}", "",
            "| job | ranks | result | what it showed | seconds |", "|---|---|---|---|---|"]
    return "\n".join(head + [line.markdown() for line in lines])


def exit_code(lines: list[Line]) -> int:
    return int(any(line.result == "FAILED" for line in lines))


def this_machine(ranks: int | None) -> Machine:
    """Raises SystemExit where it has fewer cards than `ranks`."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device, dtypes = accelerator.device_name(), [str(d).removeprefix("torch.") for d in accelerator.supported_dtypes()]
    cards = 0 if device == "cpu" else accelerator.device_count()
    if cards and ranks and ranks > cards:
        raise SystemExit(f"error: {ranks} ranks need {ranks} cards, this machine has {cards}")
    count = ranks or cards or 2
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU ranks" if device == "cpu" else device
    return Machine(count, device, f"{count} x {name}", tuple(dtypes))


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or not all(a.isdecimal() and int(a) for a in arguments):
        raise SystemExit("usage: bash tests/gpu.sh [N]    N ranks, at least 1")
    machine = this_machine(int(arguments[0]) if arguments else None)
    rows = [json.loads(line) for line in (DEMO.parents[1] / "launch/demo/requests.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "requests.jsonl")
        for row in rows:  # paths are relative to the file
            for kind in ("images", "videos"):
                row[kind] = [str(ROOT / "launch/demo" / path) for path in row.get(kind, [])]
        few = rows if machine.has_cards else [rows[0], rows[-1]]
        file.write_text("".join(json.dumps(row) + "\n" for row in few))
        lines = [outcome_of(*job) for job in jobs(machine, f"requests={file}")]
    print(table(machine, lines))
    return exit_code(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
