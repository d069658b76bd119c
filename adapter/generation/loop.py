"""The decode loop: after the prompt, which Transformers' own forward reads, one lean step a token over the same layers.

A step is the text decoder's formula on tensors that never change their shape: a cache allocated once, rotary tables
computed once, two all-reduces a layer. It computes what Transformers' forward computes of one new token; tests hold it
to the same tokens in float32. What it does not cover (beams, assisted decoding, attention outputs, hooks in the model
...) goes to Transformers' own loop, as does a model or a release whose modules are not as they must be. `why_not` says
so in words, and the ranks of a group agree on it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adapter.generation.agreement import agree_at_start, agree_on_call
from adapter.generation.changes import TextDecoderState
from adapter.generation.cuda_graph import CudaGraphStep
from adapter.generation.decoder import Decoder
from adapter.generation.kv_cache import Buffers, KVCache, Room, length_bucket
from adapter.generation.prefill import prefill
from adapter.kernels import fused
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.requests.finite import FiniteLogits, finite_generate

log = logging.getLogger("adapter")
# generate's arguments that change what a step is -> the values with which the lean one is right
FAST_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "use_cache": (None, True), "cache_implementation": (None,), "penalty_alpha": (None, 0),
    "dola_layers": (None,), "prompt_lookup_num_tokens": (None,), "prefill_chunk_size": (None,),
    "output_attentions": (None, False), "output_hidden_states": (None, False), "assistant_model": (None,),
    "assistant_early_exit": (None,), "past_key_values": (None,), "inputs_embeds": (None,), "custom_generate": (None,),
    "constraints": (None,), "force_words_ids": (None,), "num_beam_groups": (None, 1), "synced_gpus": (None, False),
}


@dataclass
class Generated:
    """What an answer is made of so far. ids: int64 [batch, S], the prompt and its new tokens. unfinished: bool [batch].
    scores, logits: of each step [batch, vocab], where the caller asked for them."""

    ids: Tensor
    unfinished: Tensor
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def output(self, config: Any) -> Any:
        """As Transformers' loop returns it: the ids, or the output class that the caller asked for."""
        if not config.return_dict_in_generate:
            return self.ids
        more: dict[str, Any] = {"scores": tuple(self.scores) or None, "logits": tuple(self.logits) or None}
        return GenerateDecoderOnlyOutput(sequences=self.ids, **more)


class DecodeLoop:
    """A sharded model's `generate`, whose decoding is `Decoder.step` wherever that is right on every rank of `tp`.
    Every rank must make it and call it. The ranks draw the same random numbers, from rank 0's generator.

    graphs: replay steps as graphs of the accelerator's. checked: a `generate` that must decode instead (desync_check).
    Raises NonFiniteLogits where the logits of a row are no numbers.
    """

    def __init__(self, model: nn.Module, plan: Plan, tp: Group, graphs: bool = False,
                 checked: Callable[..., Any] | None = None) -> None:
        self.model, self.plan, self.tp = model, plan, tp
        self.transformers: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self.generate = checked or finite_generate(model)
        self.signature = inspect.signature(self.transformers)
        refusal = None
        if checked is not None:
            refusal = "tensor_parallel.desync_check compares its steps"
        elif "custom_generate" not in self.signature.parameters:
            refusal = "this release of Transformers takes no loop of a caller's"
        start = agree_at_start(tp, fused.unavailable(get_accelerator().device_name()), refusal, graphs)
        self.refusal, self.ops = start.refusal, fused.operators(start.compiled)
        if start.remark:
            log.warning("%s", start.remark)
        self.before = TextDecoderState(model, plan)
        self.buffers = Buffers()
        self.graphs = CudaGraphStep(get_accelerator()) if start.graphs else None
        self.reported = set[str]()

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        seed, why = agree_on_call(self.tp, self.why_not(inputs, kwargs))
        with torch.inference_mode(), _drawing(seed):
            if why:
                self._report(why)
                return self.generate(*inputs, **kwargs)
            ids = kwargs.get("input_ids", kwargs.get("inputs", inputs[0] if inputs else None))
            finite = FiniteLogits(1 if ids is None else len(ids))
            decode = partial(self.decode, finite, kwargs.get("streamer"))  # generate keeps it from a caller's loop
            output = self.transformers(*inputs, **kwargs, custom_generate=decode)
            finite.raise_for(output, self.model.dtype)  # type: ignore[arg-type]
            return output

    def why_not(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why this rank would give this call to Transformers' own loop; None where it would not."""
        if self.refusal:
            return self.refusal
        call = self.signature.bind(*inputs, **kwargs).arguments
        call = call | call.get("kwargs", {})
        defaults = call.get("generation_config") or self.model.generation_config
        for name, right in FAST_ARGUMENTS.items():
            if (value := call.get(name, getattr(defaults, name, None))) not in right:
                return f"{name} is {value if isinstance(value, int | str) else 'given'}"
        mask = call.get("attention_mask")
        if mask is not None and (mask.ndim != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
            return "the prompts are not padded on the left alone"
        return self._changed()

    def _changed(self) -> str | None:
        """Why the model as it is now is not one whose steps `decoder` computes, which is made anew here."""
        try:
            why = self.before.change()
            if why is None:
                self.decoder = Decoder(self.model, self.plan, self.ops, self.tp.rank)
        except LookupError as unknown:
            why = str(unknown)
        if why and why not in self.reported:
            self.reported.add(why)
            log.warning("decoding with Transformers' own loop, which is slower, while this holds: %s", why)
        return why

    def _report(self, why: str) -> None:
        log.log(logging.DEBUG if why in self.reported else logging.INFO,
                "decoding with Transformers' own loop: %s", why)
        self.reported.add(why)

    def decode(self, finite: FiniteLogits, streamer: Any, model: Any, input_ids: Tensor, logits_processor: Any,
               stopping_criteria: Any, generation_config: Any, **model_kwargs: Any) -> Any:
        """A loop in the form of Transformers' `custom_generate`: ids int64 [batch, S] -> [batch, S + new], or its
        output class. Sampling draws as Transformers' own loop does: the same numbers from the same seed."""
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        so_far = Generated(input_ids, torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device))
        length = max(generation_config.max_length, input_ids.shape[1] + 1)
        logits, cache = self._prefill(model, input_ids, mask, length, model_kwargs)
        while True:
            logits = finite.clean(logits.float(), so_far.unfinished)
            scores = logits_processor(so_far.ids, logits.clone())
            if generation_config.output_scores:
                so_far.scores.append(scores)
            if generation_config.output_logits:
                so_far.logits.append(logits)
            new = pick(scores, generation_config.do_sample)
            if ends:
                new = torch.where(so_far.unfinished, new, generation_config._pad_token_tensor)
            so_far.ids = torch.cat([so_far.ids, new[:, None]], -1)
            if streamer is not None:
                streamer.put(new.cpu())
            stopped = stopping_criteria(so_far.ids, tuple(so_far.scores) or None)
            so_far.unfinished = so_far.unfinished & ~stopped & ~finite.steps[-1]
            if not so_far.unfinished.any():
                break
            logits = self._step(new, cache, so_far.ids.shape[1])
        if streamer is not None:
            streamer.end()
        return so_far.output(generation_config)

    def _prefill(self, model: Any, ids: Tensor, mask: Tensor, length: int,
                 model_kwargs: Mapping[str, Any]) -> tuple[Tensor, KVCache]:
        """The prompt's last logits [batch, vocab] and the cache after it, of `length` places or more."""
        batch, prompt = ids.shape
        room = Room.bucket(batch, length) if self.graphs else Room.exact(batch, prompt, length)

        def forward(cache: Any) -> Any:
            return _forward(model, ids, {**model_kwargs, "past_key_values": cache})

        logits, cache = prefill(self.decoder, forward, mask, room, self.buffers)
        if self.graphs:
            self.graphs.keep_for((self.buffers.generation, *self.decoder.addresses()))
        return logits, cache

    def _step(self, new: Tensor, cache: KVCache, filled: int) -> Tensor:
        """Logits [batch, vocab] after the newest tokens [batch]. filled: places of the cache that have a token then."""
        if self.graphs:
            cache.attended = min(length_bucket(filled), cache.length)
            return self.graphs(self.decoder.step, new, cache)
        if self.ops is fused.TorchOps:
            cache.attended = filled
        return self.decoder.step(new, cache)


def pick(scores: Tensor, sample: bool) -> Tensor:
    """The next token of each row, int64 [batch]: drawn from its scores [batch, vocab], or the best."""
    if sample:
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
    return scores.argmax(-1)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Within, random numbers are those of this seed; the generators go on afterwards as if nothing had been drawn."""
    accelerator = get_accelerator()
    devices = [] if accelerator.device_name() == "cpu" else [accelerator.current_device()]
    with torch.random.fork_rng(devices=devices, device_type=accelerator.device_name() if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _forward(model: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Any:
    """The prompt's forward as Transformers' loop would call it."""
    known = inspect.signature(model.prepare_inputs_for_generation).parameters
    more: dict[str, Any] = {}
    if "is_first_iteration" in known:
        more["is_first_iteration"] = True
    if "cache_position" in known:
        more["cache_position"] = torch.arange(input_ids.shape[1], device=input_ids.device)
    inputs = model.prepare_inputs_for_generation(input_ids, **{**model_kwargs, **more})
    return model(**inputs, return_dict=True)
