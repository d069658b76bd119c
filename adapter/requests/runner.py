"""A job: every request of a config answered, by all replicas or by one process, and a summary.

The first rank of a replica takes batches from the queue and prepares the next one while its ranks generate; rank 0
also brings the rows to where they go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import deepspeed
import torch
from torch import Tensor
from torch.distributed import HashStore
from transformers import StoppingCriteriaList

from adapter.config.schema import Config, Request
from adapter.parallel.group import Group, to_device
from adapter.requests.batching import (
    Clock,
    Generated,
    Limits,
    Row,
    Run,
    Write,
    answer_batch,
    generate,
    rank_facts,
    room,
    share,
)
from adapter.requests.out_of_memory import MemoryGuard, OutOfMemory, guard_replica
from adapter.requests.processing import Prepared, RequestError, RequestProcessor
from adapter.requests.results import Answers
from adapter.requests.scheduler import BatchQueue, ProgressTicks, join_queue
from policies.errors import BAD_INPUT, CHECK_FAILED, DONE, UserError

BEAT_S = 2.0  # how often a replica that is done lets its ranks know that others are not
T = TypeVar("T")


@dataclass(frozen=True)
class Tally:
    """Counts of what became of a job's requests.

    resumed: of the answered and failed, those that a former run left in the output.
    """

    answered: int = 0
    failed: int = 0
    wrong: int = 0
    new_tokens: int = 0
    resumed: int = 0

    @property
    def exit_code(self) -> int:
        return BAD_INPUT if self.failed else CHECK_FAILED if self.wrong else DONE

    def plus(self, rows: Sequence[Row], resumed: bool = False) -> Tally:
        failed = sum("error" in row for row in rows)
        return Tally(self.answered + len(rows) - failed, self.failed + failed,
                     self.wrong + sum(not row.get("correct", True) for row in rows),
                     self.new_tokens + sum(row.get("new_tokens", 0) for row in rows),
                     self.resumed + len(rows) * resumed)

    def summary(self, config: Config, tp_size: int, began: float) -> Row:
        """Return the last line of a command's results."""
        return {"summary": True, "tp_size": tp_size, "requests": len(config.requests), **asdict(self),
                "seconds": round(time.perf_counter() - began, 3)}


def make_processor(config: Config, context: int) -> RequestProcessor:
    """Make the processor for a config's requests. Raises UserError where the checkpoint's cannot be used."""
    if not config.requests:
        raise UserError("requests: there are none; give prompts in the YAML or the path of a JSON-lines file")
    return RequestProcessor(config.model.path, config.processor, room(config, context) - 1)  # for one new token


def answer_all(config: Config, engine: deepspeed.InferenceEngine, processor: RequestProcessor | None,
               answers: Answers | None, write: Write) -> Tally:
    """Answer every request of the config; every rank must call it. Each replica's first rank has a `processor`, rank 0
    `answers` and `write` (for the summary).

    A request that cannot be prepared is a row with `error`; the others are answered. The same Tally on every rank.
    """
    began, mpu = time.perf_counter(), engine.mpu
    limits = Limits.of(config, engine.plan.geometry.context, engine.module.generation_config)
    batches = split(_pending(config, answers, mpu.world), config.batch_size, mpu.replicas.size)
    queue, guard, tally = join_queue(mpu, len(batches)), guard_replica(mpu), Tally()
    if mpu.tp.rank == 0:
        assert processor is not None
        watched = {"stopping_criteria": StoppingCriteriaList([ProgressTicks(queue)])} if mpu.replicas.size > 1 else {}

        def run(inputs: dict[str, Tensor], clock: Clock) -> Generated:
            shared = share(inputs, mpu.tp)
            return guard.run(lambda: generate(shared, partial(engine.generate, **watched), limits, clock))

        tally = _work(batches, queue, processor, limits, run, answers)
        share({}, mpu.tp)
        tally = _await_others(queue, mpu.tp, answers, tally)
    else:
        while inputs := share({}, mpu.tp):
            with suppress(OutOfMemory):  # the first rank has come to the same, and sends a smaller batch
                guard.run(partial(generate, inputs, engine.generate, limits, Clock()))
        while mpu.tp.agreed(0):
            pass
    tally = Tally(*mpu.world.broadcast(to_device(torch.tensor(list(asdict(tally).values())))).tolist())
    ranks = rank_facts(engine)
    if answers is not None:
        answers.finish()
        write(tally.summary(config, mpu.tp.size, began) | {"replicas": mpu.replicas.size, "ranks": ranks})
    return tally


def answer(config: Config, processor: RequestProcessor, limits: Limits, run: Run, answers: Answers) -> Tally:
    """Answer every request of the config in one process, which `run`s the batches."""
    batches = split([r for r in config.requests if r.id not in answers.done], config.batch_size, 1)
    queue, guard = BatchQueue(HashStore(), len(batches)), MemoryGuard()
    tally = _work(batches, queue, processor, limits, lambda *batch: guard.run(partial(run, *batch)), answers)
    answers.finish()
    return tally


def split(requests: Sequence[Request], size: int, replicas: int) -> list[Sequence[Request]]:
    """Split requests into batches of at most `size`, smaller where some replica would get none."""
    count = len(requests)
    if count > size * replicas:
        return [requests[start:start + size] for start in range(0, count, size)]
    cuts = [count * i // replicas for i in range(replicas + 1)]
    return [requests[start:end] for start, end in pairwise(cuts) if start < end]


def _pending(config: Config, answers: Answers | None, world: Group) -> list[Request]:
    """Return the requests that no former run has answered, on every rank as rank 0 knows them."""
    done = answers.done if answers is not None else {}
    mask = torch.tensor([r.id not in done for r in config.requests], dtype=torch.uint8)
    return [r for r, todo in zip(config.requests, world.broadcast(to_device(mask)).tolist(), strict=True) if todo]


def _work(batches: Sequence[Sequence[Request]], queue: BatchQueue, processor: RequestProcessor, limits: Limits,
          run: Run, answers: Answers | None) -> Tally:
    """Answer the batches that this replica takes from the queue."""
    def prepared() -> Iterator[tuple[int, list[Prepared | RequestError]]]:
        for number in queue.take():
            yield number, [_prepare(processor, request) for request in batches[number]]

    tally = Tally() if answers is None else Tally().plus(list(answers.done.values()), resumed=True)
    for number, items in read_ahead(prepared()):
        rows = answer_batch(items, processor, limits, run)
        queue.post(number, [_judged(row, r) for row, r in zip(rows, batches[number], strict=True)])
        tally = _collect(queue, answers, tally)
    return tally


def _prepare(processor: RequestProcessor, request: Request) -> Prepared | RequestError:
    try:
        return processor.prepare(request)
    except RequestError as error:
        return RequestError(error.request_id, error.reason)  # without the frames it came through, which hold pixels


def _judged(row: Row, request: Request) -> Row:
    if request.expected is None or "error" in row:
        return row
    return row | {"expected": request.expected, "correct": row["answer"] == request.expected}


def _collect(queue: BatchQueue, answers: Answers | None, tally: Tally) -> Tally:
    if answers is not None:
        for number, rows in queue.collect():
            answers.add(number, rows)
            tally = tally.plus(rows)
    return tally


def _await_others(queue: BatchQueue, tp: Group, answers: Answers | None, tally: Tally) -> Tally:
    """Wait until every replica is done. This one's ranks wait in beats, so that no collective times out."""
    beat = time.monotonic()
    while not queue.finished():
        tally = _collect(queue, answers, tally)
        time.sleep(0.05)
        if time.monotonic() - beat > BEAT_S:
            tp.agreed(1)
            beat = time.monotonic()
    tp.agreed(0)
    return _collect(queue, answers, tally)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, each made in another thread while the one before it is used."""
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
