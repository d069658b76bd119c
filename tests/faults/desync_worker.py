"""Ranks that part ways. What each rank saw goes to OUT/rank<r>.json.

    deepspeed --num_accelerators 3 desync_worker.py PART MODEL_DIR OUT

PART digests: each fault, planted on rank 1, with and without the check; the last one is left to end the command.
PART early: rank 1 alone ends its answer, between two comparisons; with early-torch, over torch's group, which does not
see that. PART endless: rank 0 takes its time to prepare, then all generate until something ends them.

How the ranks sum is given, not chosen by what was quicker as the job started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

import torch
import transformers
from checkpoints import EOS, cases
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from worker import inputs_for

from adapter.commands import common

PLANTED, NEW, LIMIT_S = 1, 6, 15.0
Inputs = dict[str, Tensor]


class Prefer(LogitsProcessor):
    """The given token at one step (the first is 1), the model's own choice at the others."""

    def __init__(self, token: int, step: int, prompt: int) -> None:
        self.token, self.width = token, prompt + step - 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.width:
            scores = scores.clone()
            scores[:, self.token] = scores.max() + 50
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.width)


@contextmanager
def other_positions(model: Any, step: int) -> Iterator[None]:
    """The text encoder gets other position ids at one step."""
    layers = next(n for n, _ in model.named_modules() if n.endswith("layers.0")).rpartition(".layers")[0]
    seen: list[int] = []

    def shift(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(1)
        return (args, kwargs | {"position_ids": kwargs["position_ids"] + 1}) if len(seen) == step else None

    hook = model.get_submodule(layers).register_forward_pre_hook(shift, with_kwargs=True)
    yield
    hook.remove()


@contextmanager
def other_features(model: Any) -> Iterator[None]:
    """The vision encoder's output is a little off."""
    encoder = model.visual if hasattr(model, "visual") else model.model.visual
    forward = encoder.forward

    def off(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return out + 1e-4
        out.pooler_output = out.pooler_output + 1e-4
        return out

    encoder.forward = off
    yield
    del encoder.forward


FIXED = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
FREE = {"max_new_tokens": NEW, "do_sample": False}
BEAMS, DRAWN = FIXED | {"num_beams": 3}, FIXED | {"do_sample": True, "temperature": 1.5}


class Runs:
    """Generates on engines, with and without a fault on this rank. here: whether this rank has the faults."""

    def __init__(self, here: bool) -> None:
        self.here, self.inputs = here, inputs_for(cases()["batch"], "cpu")
        self.prompt = self.inputs["input_ids"].shape[1]

    def __call__(self, engine: Any, given: Inputs | None = None, arguments: dict[str, Any] = FIXED,
                 **planted: Any) -> Any:
        """Tokens, or the message of a Desync."""
        from adapter.health.desync import Desync

        try:
            return engine.generate(**(given or self.inputs), **arguments, **(planted if self.here else {})).tolist()
        except Desync as error:
            return str(error)

    def token(self, step: int, which: int = 50) -> dict[str, Any]:
        return {"logits_processor": [Prefer(which, step, self.prompt)]}


def digests(engine_of: Callable[[int], Any], loaded: Callable[[int], Any], out: Path) -> int:
    off, on, third = engine_of(0), loaded(1), engine_of(3)
    tp = on.mpu.tp
    run = Runs(tp.rank == PLANTED)
    facts: dict[str, Any] = {}
    for name, arguments in (("greedy", FIXED), ("beams", BEAMS), ("drawn", DRAWN)):
        for key, engine in (("off", off), ("on", on), ("third", third)):
            torch.manual_seed(11)
            facts[f"no fault, {name}, {key}"] = run(engine, arguments=arguments)
    for key, engine in (("off", off), ("on", on), ("third", third)):
        facts[f"token, {key}"] = run(engine, **run.token(4))
    facts["token of a beam, on"] = run(on, arguments=BEAMS, **run.token(4))
    facts["EOS, on"] = run(on, arguments=FREE, **run.token(2, EOS))
    facts["criterion, on"] = run(on, stopping_criteria=[StopAt(run.prompt + 3)])
    facts |= other_inputs(run, off, on) | other_values(run, off, on)
    facts["hooks left"] = hooks(on.module) - hooks(off.module)
    facts["afterwards, on"] = run(on)
    (out / f"rank{tp.rank}.json").write_text(json.dumps(facts))
    tp.barrier()
    on.generate(**run.inputs, **FIXED, **(run.token(1) if run.here else {}))
    return 0


def other_inputs(run: Runs, off: Any, on: Any) -> dict[str, Any]:
    """One rank has another token in its prompt, or a shorter prompt."""
    changed = run.inputs["input_ids"].clone()
    changed[0, -1] += 1
    given = run.inputs | {"input_ids": changed} if run.here else run.inputs
    facts = {"input ids, off": run(off, given), "input ids, on": run(on, given)}
    long = inputs_for(cases()["text"], "cpu")
    short = {k: v[:, :-3] for k, v in long.items()}
    return facts | {"length, on": run(on, short if run.here else long)}


def other_values(run: Runs, off: Any, on: Any) -> dict[str, Any]:
    """One rank computes with other positions, or with other image features."""
    facts = {}
    for key, engine in (("off", off), ("on", on)):
        with other_positions(engine.module, 3) if run.here else nullcontext():
            facts[f"position ids, {key}"] = run(engine)
        with other_features(engine.module) if run.here else nullcontext():
            facts[f"image features, {key}"] = run(engine)
    return facts


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def early(engine_of: Callable[[int], Any]) -> int:
    from adapter.health.watchdog import watching

    engine = engine_of(8)
    inputs = inputs_for(cases()["image"], "cpu")
    planted = {"logits_processor": [Prefer(EOS, 2, inputs["input_ids"].shape[1])]} \
        if engine.mpu.tp.rank == PLANTED else {"min_new_tokens": 500}
    with watching(engine.mpu, LIMIT_S):
        engine.generate(**inputs, max_new_tokens=500, do_sample=False, **planted)
    return 0


def endless(engine_of: Callable[[int], Any], out: Path) -> int:
    from adapter.health.watchdog import watching
    from adapter.requests.batching import share

    engine = engine_of(0)
    tp = engine.mpu.tp
    with watching(engine.mpu, LIMIT_S):
        inputs = {}
        if tp.rank == 0:
            while not (out / "go").exists():  # until the test has seen the others warn
                time.sleep(0.05)
            inputs = inputs_for(cases()["text"], "cpu")
        inputs = share(inputs, tp)
        if tp.rank == 0:
            print("generating", file=sys.stderr, flush=True)
        engine.generate(**inputs, max_new_tokens=4000, min_new_tokens=4000, do_sample=False)
    return 0


def main(args: argparse.Namespace, results: common.Results) -> int:
    import adapter
    from adapter.config.load import from_dict

    def engine_of(every: int) -> Any:
        return adapter.init_inference(from_dict({
            "model": {"path": str(args.model), "dtype": "float32"},
            "tensor_parallel": {"tp_size": 3, "desync_check": every}}, Path(".")))

    def loaded(every: int) -> Any:
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(args.model, torch_dtype=torch.float32)
        return adapter.init_inference(model=model.eval(), tensor_parallel={"tp_size": 3, "desync_check": every})

    from adapter.parallel import all_reduce

    all_reduce.quickest = lambda routes, times: routes[-1 if args.part == "early-torch" else 0]
    if args.part == "digests":
        return digests(engine_of, loaded, args.out)
    return endless(engine_of, args.out) if args.part == "endless" else early(engine_of)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--local_rank", type=int)
    p.add_argument("part", choices=["digests", "early", "early-torch", "endless"])
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    common.run(main, p)
