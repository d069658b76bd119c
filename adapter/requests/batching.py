"""One batch: prepared requests in, rows out. The first rank prepares, its replica's ranks generate together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import safetensors.torch
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adapter.config.schema import Config
from adapter.parallel.group import Group, exchange, to_device
from adapter.requests.finite import NonFiniteLogits
from adapter.requests.identity import stated_limit
from adapter.requests.out_of_memory import MemoryGuard, OutOfMemory
from adapter.requests.processing import Prepared, RequestError, RequestProcessor, collate

log = logging.getLogger("adapter")
Row = dict[str, Any]
Write = Callable[[Row], None]
ALONE = MemoryGuard()  # for what one rank does before the others begin
DEFAULT_NEW_TOKENS = 256  # where the config sets neither max_new_tokens nor max_length; Transformers' own is 20 in all


class Clock(BaseStreamer):
    """Records the times of the tokens of a generate call; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Generated:
    """What came of a batch. tokens: int64 [B, new]. failed: row -> why it has no answer."""

    tokens: Tensor
    failed: Mapping[int, str] = field(default_factory=dict)


Run = Callable[[dict[str, Tensor], Clock], Generated]  # inputs of a batch -> what came of it


@dataclass(frozen=True)
class Limits:
    """generate's arguments, how long prompt and answer may be together in tokens, and where an answer ends.

    arguments: of the config; single: whether one beam is followed, which is what Transformers can stream; level: the
    one at which a batch is logged.
    """

    arguments: dict[str, Any]
    context: int
    ends: tuple[int, ...]
    single: bool
    level: int = logging.INFO

    @classmethod
    def of(cls, config: Config, context: int, defaults: GenerationConfig) -> Limits:
        """`defaults` are the checkpoint's own; the config goes before them."""
        arguments = {"max_new_tokens": DEFAULT_NEW_TOKENS, **config.generation}
        ends = arguments.get("eos_token_id", defaults.eos_token_id)
        beams = arguments.get("num_beams", defaults.num_beams) or 1
        level = logging.INFO if config.output is None else logging.DEBUG  # there a bar tells
        ends = tuple(ends if isinstance(ends, list) else [ends])
        return cls(arguments, room(config, context), ends, beams == 1, level)

    def for_prompt(self, tokens: int) -> dict[str, Any]:
        """Return the arguments for a batch `tokens` long: the answer ends where the context does."""
        return self.arguments | {"max_new_tokens": min(self.arguments["max_new_tokens"], self.context - tokens)}


def room(config: Config, context: int) -> int:
    """Return how many tokens prompt and answer may have together: the model's limit, or the deepspeed section's."""
    stated = stated_limit(config)
    return min(context, stated) if isinstance(stated, int) else context  # DeepSpeed refuses what is not a number


def answer_batch(items: Sequence[Prepared | RequestError], processor: RequestProcessor, limits: Limits,
                 run: Run) -> list[Row]:
    """Return a row for each item, in their order: what was generated, or why nothing was."""
    rows: dict[str, Row] = {}
    for item in items:
        if isinstance(item, RequestError):
            rows[item.request_id] = failed_row(item.request_id, item.reason)
    for batch in padded_together([item for item in items if isinstance(item, Prepared)], limits):
        rows |= {row["id"]: row for row in _rows_that_fit(batch, processor, limits, run)}
    return [rows[item.request_id if isinstance(item, RequestError) else item.id] for item in items]


def failed_row(request_id: str, reason: str) -> Row:
    """The row of a request that has no answer, which is logged; the other rows of its batch stay as they are."""
    log.error("request %s failed: %s", request_id, reason)
    return {"id": request_id, "error": reason}


def _rows_that_fit(batch: Sequence[Prepared], processor: RequestProcessor, limits: Limits, run: Run) -> list[Row]:
    """The rows of a batch; where memory runs out those of its halves, and a single request fails."""
    try:
        return _rows(batch, processor, limits, run)
    except OutOfMemory as error:
        reason = str(error)
    if len(batch) == 1:
        return [failed_row(batch[0].id, f"out of memory: its {batch[0].prompt_tokens} tokens and their answer do not "
                           f"fit ({reason}); lower max_pixels or generation.max_new_tokens, or use more ranks")]
    log.warning("out of memory for %d requests at once (%s); they are tried in two halves", len(batch), reason)
    half = len(batch) // 2
    return [row for part in (batch[:half], batch[half:]) for row in _rows_that_fit(part, processor, limits, run)]


def padded_together(items: Sequence[Prepared], limits: Limits) -> Iterator[list[Prepared]]:
    """Yield the items in order, as batches; an item whose padding would cut the answers of others starts another."""
    batch: list[Prepared] = []
    for item in items:
        longest = max(other.prompt_tokens for other in [*batch, item])
        if batch and longest + limits.arguments["max_new_tokens"] > limits.context:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def share(tensors: dict[str, Tensor], tp: Group) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank, by one broadcast of their safetensors form; {} says that none follow."""
    if tp.size == 1:
        return tensors
    payload = ALONE.run(lambda: safetensors.torch.save(tensors)) if tensors and tp.rank == 0 else b""
    size = int(tp.broadcast(to_device(torch.tensor([len(payload)]))))
    if not size:
        return {}
    buffer = torch.frombuffer(bytearray(payload or size), dtype=torch.uint8)
    buffer = tp.broadcast(to_device(buffer))
    return tensors if tp.rank == 0 else safetensors.torch.load(buffer.cpu().numpy().tobytes())


def generate(inputs: dict[str, Tensor], call: Callable[..., Tensor], limits: Limits, clock: Clock) -> Generated:
    """A batch's new tokens from an engine's or a model's `generate`. A row whose logits are not finite has failed."""
    prompt, failed = inputs["input_ids"].shape[1], dict[int, str]()
    on_device = {k: to_device(v) for k, v in inputs.items()}
    streamer = clock if limits.single else None
    try:
        output = call(**on_device, **limits.for_prompt(prompt), streamer=streamer)
    except NonFiniteLogits as error:
        output, failed = error.output, {row: error.reason(row) for row in error.rows}
    return Generated(output[:, prompt:].cpu(), failed)


def _rows(batch: Sequence[Prepared], processor: RequestProcessor, limits: Limits, run: Run) -> list[Row]:
    """Generate for one batch and make its rows. ttft_s is to the batch's first token, decode_tok_s that of one row;
    None where beams hide when a token came."""
    log.log(limits.level, "generating: requests %s", ", ".join(item.id for item in batch))
    inputs, clock = ALONE.run(lambda: collate(batch, processor.pad_token_id)), Clock()
    began = time.perf_counter()
    generated = run(inputs, clock)
    times = clock.times[1:]
    rows: list[Row] = []
    for i, (item, ids) in enumerate(zip(batch, generated.tokens.tolist(), strict=True)):
        if i in generated.failed:
            rows.append(failed_row(item.id, generated.failed[i]))
            continue
        tokens = _until_end(ids, limits.ends)
        rows.append({
            "id": item.id, "answer": processor.decode(tokens, item.continued), "tokens": tokens,
            "prompt_tokens": item.prompt_tokens, "new_tokens": len(tokens),
            "ttft_s": round(times[0] - began, 4) if times else None,
            "decode_tok_s": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None,
        })
    return rows


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return a row's tokens up to and with its end-of-sequence token; what follows is the batch's padding."""
    for i, token in enumerate(ids):
        if token in ends:
            return list(ids[: i + 1])
    return list(ids)


@dataclass(frozen=True)
class RankFacts:
    """What one rank holds and has read: bytes, seconds of loading, and its place among the job's replicas."""

    replica: int
    tp_rank: int
    weight_bytes: int
    bytes_read: int
    load_s: float
    pss_bytes: int
    device_peak_bytes: int


def rank_facts(engine: deepspeed.InferenceEngine) -> list[dict[str, Any]]:
    """A row for each rank of the job: its heads, what it holds and what it read. Every rank must call it.

    pss_bytes: host memory, shared pages split among sharers. device_peak_bytes: the most that torch has held on the
    rank's card so far; only where there is one.
    """
    load, mpu = engine.load_report, engine.mpu
    mine = RankFacts(mpu.replicas.rank, mpu.tp.rank, load.weight_bytes, load.bytes_read, round(load.seconds, 6),
                     proportional_set_size(), device_peak_bytes())
    text, vision = engine.plan.heads["text"], engine.plan.heads["vision"]
    rows = []
    for rank, facts in enumerate(RankFacts(**card) for card in exchange(mpu.world, asdict(mine))):
        place = facts.tp_rank
        rows.append({
            "rank": rank, "replica": facts.replica, "q_heads": list(text[place].q), "kv_heads": list(text[place].kv),
            "vision_heads": list(vision[place].q), "weight_bytes": facts.weight_bytes,
            "bytes_read": facts.bytes_read, "load_s": facts.load_s, "pss_bytes": facts.pss_bytes,
            **({"device_peak_bytes": facts.device_peak_bytes} if facts.device_peak_bytes else {}),
        })
    return rows


def device_peak_bytes() -> int:
    """The most bytes that torch has held on this rank's card so far. 0 on CPU."""
    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else int(accelerator.max_memory_allocated())


def proportional_set_size() -> int:
    """This process's memory in bytes, shared pages by their share (PSS). 0 where the kernel reports none."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return 0
    return sum(int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
