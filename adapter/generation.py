"""Requests in, answers out: rank 0 prepares, every rank gets the tensors, all generate together, rank 0 reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import safetensors.torch
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adapter.command import BAD_INPUT, CHECK_FAILED, DONE
from adapter.processing import Prepared, RequestError, RequestProcessor, collate
from adapter.schema import Config, Request
from adapter.topology import TensorParallel
from policies.errors import UserError

log = logging.getLogger("adapter")
Write = Callable[[dict[str, Any]], None]
DEFAULT_NEW_TOKENS = 256  # where the config sets neither max_new_tokens nor max_length; Transformers' own is 20 in all


class Clock(BaseStreamer):
    """Times of the tokens of a generate call; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Tally:
    """What a run came to."""

    answered: int = 0
    failed: int = 0
    wrong: int = 0
    new_tokens: int = 0

    @property
    def exit_code(self) -> int:
        return BAD_INPUT if self.failed else CHECK_FAILED if self.wrong else DONE

    def summary(self, config: Config, tp_size: int, began: float) -> dict[str, Any]:
        """The last line of a command's results."""
        return {"summary": True, "tp_size": tp_size, "requests": len(config.requests), **asdict(self),
                "seconds": round(time.perf_counter() - began, 3)}


def answer_all(config: Config, engine: deepspeed.InferenceEngine, tp: TensorParallel,
               processor: RequestProcessor | None, write: Write) -> Tally:
    """Answer every request of the config; every rank must call it. `processor` and `write` (a row per request) are
    rank 0's.

    A request that cannot be prepared is a row with `error`; the others are answered. The same Tally on every rank.
    """
    began = time.perf_counter()
    limits = Limits.of(config, engine.plan.geometry.context, engine.module.generation_config)
    tally = Tally()
    if processor is not None:
        def run(inputs: dict[str, Tensor], clock: Clock) -> Tensor:
            return generate(share(inputs, tp), engine.generate, limits, clock)

        tally = answer(config, processor, limits, run, write)
        share({}, tp)
    else:
        while inputs := share({}, tp):
            generate(inputs, engine.generate, limits, Clock())
    counts = torch.tensor([tally.answered, tally.failed, tally.wrong, tally.new_tokens])
    tally = Tally(*tp.broadcast(to_device(counts)).tolist())
    ranks = rank_facts(engine, tp)
    if tp.rank == 0:
        write(tally.summary(config, tp.size, began) | {"ranks": ranks})
    return tally


def make_processor(config: Config, context: int) -> RequestProcessor:
    """The processor for a config's requests. Raises UserError where the checkpoint's cannot be used."""
    if not config.requests:
        raise UserError("requests: there are none; give prompts in the YAML or the path of a JSON-lines file")
    return RequestProcessor(config.model.path, config.processor, _room(config, context) - 1)  # for one new token


def answer(config: Config, processor: RequestProcessor, limits: Limits,
           run: Callable[[dict[str, Tensor], Clock], Tensor], write: Write) -> Tally:
    """Prepare, batch, `run` and report every request of the config, in one process."""
    expected = {r.id: r.expected for r in config.requests}
    tally = Tally()
    for batch, errors in _batches(config.requests, processor, config.batch_size, limits):
        for error in errors:
            log.error("request %s failed: %s", error.request_id, error.reason)
            write({"id": error.request_id, "error": error.reason})
        rows = _rows(batch, processor, limits, run) if batch else []
        for row in rows:
            right = expected[row["id"]]
            write(row if right is None else row | {"expected": right, "correct": row["answer"] == right})
        wrong = sum(expected[r["id"]] not in (None, r["answer"]) for r in rows)
        new_tokens = sum(r["new_tokens"] for r in rows)
        tally = Tally(tally.answered + len(rows), tally.failed + len(errors), tally.wrong + wrong,
                      tally.new_tokens + new_tokens)
    return tally


@dataclass(frozen=True)
class Limits:
    """generate's arguments, how long prompt and answer may be together in tokens, and where an answer ends.

    arguments: of the config; single: whether one beam is followed, which is what Transformers can stream.
    """

    arguments: dict[str, Any]
    context: int
    ends: tuple[int, ...]
    single: bool

    @classmethod
    def of(cls, config: Config, context: int, defaults: GenerationConfig) -> Limits:
        """`defaults` are the checkpoint's own; the config goes before them."""
        arguments = {"max_new_tokens": DEFAULT_NEW_TOKENS, **config.generation}
        ends = arguments.get("eos_token_id", defaults.eos_token_id)
        beams = arguments.get("num_beams", defaults.num_beams) or 1
        return cls(arguments, _room(config, context), tuple(ends if isinstance(ends, list) else [ends]), beams == 1)

    def for_prompt(self, tokens: int) -> dict[str, Any]:
        """The arguments for a batch `tokens` long: the answer ends where the context does."""
        return self.arguments | {"max_new_tokens": min(self.arguments["max_new_tokens"], self.context - tokens)}


def _room(config: Config, context: int) -> int:
    """Tokens of prompt and answer together: the model's, or fewer where the deepspeed section says so."""
    stated = config.deepspeed.get("max_out_tokens", config.deepspeed.get("max_tokens"))
    return min(context, stated) if isinstance(stated, int) else context  # DeepSpeed refuses what is not a number


def _batches(
    requests: Sequence[Request], processor: RequestProcessor, size: int, limits: Limits
) -> Iterator[tuple[list[Prepared], list[RequestError]]]:
    """Prepared requests in order, up to `size` together, with the errors of those among them that cannot be prepared.

    A prompt so long that padding to it would cut the answers of others starts a batch of its own.
    """
    batch: list[Prepared] = []
    errors: list[RequestError] = []
    for request in requests:
        try:
            item = processor.prepare(request)
        except RequestError as error:
            errors.append(error)
            continue
        longest = max(other.prompt_tokens for other in [*batch, item])
        if batch and (len(batch) == size or longest + limits.arguments["max_new_tokens"] > limits.context):
            yield batch, errors
            batch, errors = [], []
        batch.append(item)
    if batch or errors:
        yield batch, errors


def share(tensors: dict[str, Tensor], tp: TensorParallel) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank, in one broadcast of their safetensors form; {} means that there is no more."""
    if tp.size == 1:
        return tensors
    payload = safetensors.torch.save(tensors) if tensors and tp.rank == 0 else b""
    size = int(tp.broadcast(to_device(torch.tensor([len(payload)]))))
    if not size:
        return {}
    buffer = torch.frombuffer(bytearray(payload or size), dtype=torch.uint8)
    buffer = tp.broadcast(to_device(buffer))
    return tensors if tp.rank == 0 else safetensors.torch.load(buffer.cpu().numpy().tobytes())


def to_device(x: Tensor) -> Tensor:
    return x.to(get_accelerator().current_device_name())


def generate(inputs: dict[str, Tensor], call: Callable[..., Tensor], limits: Limits, clock: Clock) -> Tensor:
    """New tokens, int64 [B, new], from an engine's or a model's `generate`."""
    prompt = inputs["input_ids"].shape[1]
    on_device = {k: to_device(v) for k, v in inputs.items()}
    streamer = clock if limits.single else None
    return call(**on_device, **limits.for_prompt(prompt), streamer=streamer)[:, prompt:].cpu()


def _rows(batch: Sequence[Prepared], processor: RequestProcessor, limits: Limits,
          run: Callable[[dict[str, Tensor], Clock], Tensor]) -> list[dict[str, Any]]:
    """Generate for one batch and make its rows. ttft_s is to the batch's first token, decode_tok_s that of one row;
    None where beams hide when a token came."""
    log.info("generating: requests %s", ", ".join(item.id for item in batch))
    inputs, clock = collate(batch, processor.pad_token_id), Clock()
    began = time.perf_counter()
    new = run(inputs, clock)
    times = clock.times[1:]
    rows = []
    for item, ids in zip(batch, new.tolist(), strict=True):
        tokens = _until_end(ids, limits.ends)
        rows.append({
            "id": item.id, "answer": processor.decode(tokens), "tokens": tokens, "prompt_tokens": item.prompt_tokens,
            "new_tokens": len(tokens), "ttft_s": round(times[0] - began, 4) if times else None,
            "decode_tok_s": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None,
        })
    return rows


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A row's tokens up to and with its end-of-sequence token; what follows is the batch's padding."""
    for i, token in enumerate(ids):
        if token in ends:
            return list(ids[: i + 1])
    return list(ids)


def rank_facts(engine: deepspeed.InferenceEngine, tp: TensorParallel) -> list[dict[str, Any]]:
    """What each rank holds and read, in bytes; every rank must call it. PSS: shared pages are split among sharers."""
    load = engine.load_report
    numbers = [load.weight_bytes, load.bytes_read, int(load.seconds * 1e6), proportional_set_size()]
    mine = to_device(torch.tensor(numbers))
    rows = tp.all_gather_last(mine, (4,) * tp.size).view(tp.size, 4).tolist()
    text, vision = (engine.plan.heads[tower] for tower in ("text", "vision"))
    return [
        {"rank": r, "q_heads": list(text[r].q), "kv_heads": list(text[r].kv), "vision_heads": list(vision[r].q),
         "weight_bytes": row[0], "bytes_read": row[1], "load_s": row[2] / 1e6, "pss_bytes": row[3]}
        for r, row in enumerate(rows)
    ]


def proportional_set_size() -> int:
    """This process's memory in bytes, pages it shares counted by its share. 0 where the kernel does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return 0
    return sum(int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
