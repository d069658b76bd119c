"""The decode loop: after the prompt, which Transformers' own forward reads, one lean step a token over the same layers.

A step is the text encoder's formula on tensors that never change their shape: a cache allocated once, rotary tables
computed once, no masks, two all-reduces a layer. It computes what Transformers' forward computes of one new
token; tests hold it to the same tokens in float32. What it does not cover (beams, assisted decoding, attention outputs
...) goes to Transformers' own loop, as does a model or a release whose parts are not as they must be: `why_not` says
so in words.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adapter.generation.cuda_graph import CudaGraphStep
from adapter.generation.decoder import Decoder
from adapter.generation.prefill import prefill
from adapter.planning.plan import Plan

log = logging.getLogger("adapter")
# generate's arguments that change what a step is -> the values with which the lean one is right
FAST_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "use_cache": (None, True), "cache_implementation": (None,), "penalty_alpha": (None, 0),
    "dola_layers": (None,), "prompt_lookup_num_tokens": (None,), "prefill_chunk_size": (None,),
    "output_attentions": (None, False), "output_hidden_states": (None, False), "assistant_model": (None,),
    "assistant_early_exit": (None,), "past_key_values": (None,), "inputs_embeds": (None,), "custom_generate": (None,),
    "constraints": (None,), "force_words_ids": (None,), "num_beam_groups": (None, 1), "synced_gpus": (None, False),
}


class DecodeLoop:
    """A model's `generate` whose decoding is `Decoder.step` wherever that is right. Every rank must call it.

    graphs: capture the step of each answer as a graph of the accelerator's.
    """

    def __init__(self, model: nn.Module, plan: Plan, graphs: bool = False) -> None:
        self.model, self.plan, self.generate, self.graphs = model, plan, model.generate, graphs
        self.signature = inspect.signature(model.generate)  # type: ignore[arg-type]

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if why := self.why_not(inputs, kwargs):
            log.debug("decoding with Transformers' own loop: %s", why)
            return self.generate(*inputs, **kwargs)  # type: ignore[operator]
        decode = partial(self.decode, kwargs.get("streamer"))  # generate keeps a streamer from a loop of a caller's
        return self.generate(*inputs, **kwargs, custom_generate=decode)  # type: ignore[operator]

    @cached_property
    def decoder(self) -> Decoder | str:
        """The text encoder taken apart, or why it cannot be; asked once the model is where it computes."""
        try:
            if "custom_generate" not in self.signature.parameters:
                raise LookupError("this release of Transformers takes no loop of a caller's")
            return Decoder(self.model, self.plan)
        except LookupError as missing:
            log.info("decoding with Transformers' own loop, always: %s", missing)
            return str(missing)

    def why_not(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why this call goes to Transformers' own loop; None where it does not."""
        call = self.signature.bind(*inputs, **kwargs).arguments
        call = call | call.get("kwargs", {})
        defaults = call.get("generation_config") or self.model.generation_config
        for name, right in FAST_ARGUMENTS.items():
            if (value := call.get(name, getattr(defaults, name, None))) not in right:
                return f"{name} is {value if isinstance(value, int | str) else 'given'}"
        mask = call.get("attention_mask")
        if mask is not None and (mask.ndim != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
            return "the prompts are not padded on the left alone"
        return self.decoder if isinstance(self.decoder, str) else None

    def decode(self, streamer: Any, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
               generation_config: Any, **model_kwargs: Any) -> Any:
        """A loop in the form of Transformers' `custom_generate`: ids int64 [B, S] -> [B, S + new], or its output class.

        Sampling draws as Transformers' own loop does: the same numbers from the same seed.
        """
        decoder = self.decoder
        assert isinstance(decoder, Decoder)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        logits, state = prefill(decoder, lambda: _forward(model, input_ids, model_kwargs), mask,
                                        max(generation_config.max_length, input_ids.shape[1] + 1))
        step: Callable[[Tensor], Tensor] = partial(decoder.step, state=state)
        if self.graphs:
            step = CudaGraphStep(step, get_accelerator())
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
        scored: list[Tensor] = []
        raw: list[Tensor] = []
        while True:
            logits = logits.float()
            scores = logits_processor(input_ids, logits.clone())
            if generation_config.output_scores:
                scored.append(scores)
            if generation_config.output_logits:
                raw.append(logits)
            new = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if generation_config.do_sample \
                else scores.argmax(-1)
            if ends:
                new = new * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
            input_ids = torch.cat([input_ids, new[:, None]], -1)
            if streamer is not None:
                streamer.put(new.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, tuple(scored) or None)
            if not unfinished.any():
                break
            logits = step(new)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        output: dict[str, Any] = {"scores": tuple(scored) or None, "logits": tuple(raw) or None}
        return GenerateDecoderOnlyOutput(sequences=input_ids, **output)  # type: ignore[arg-type]


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
