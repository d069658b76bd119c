"""The decode loop: after the prompt, which Transformers' own forward reads, one lean step a token over the same layers.

A step is the text tower's formula on tensors that never change their shape: a cache allocated once, rotary tables
computed once, no masks, two all-reduces a layer. It computes what Transformers' forward computes of one new
token; tests hold it to the same tokens in float32. What it does not cover (beams, assisted decoding, attention outputs
...) goes to Transformers' own loop, as does a model or a release whose parts are not as they must be: `why_not` says
so in words.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adapter import fused
from adapter.attention import attend_causal
from adapter.graphs import Graphed
from adapter.plan import Plan

log = logging.getLogger("adapter")
# generate's arguments that change what a step is -> the values with which the lean one is right
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "use_cache": (None, True), "cache_implementation": (None,), "penalty_alpha": (None, 0),
    "dola_layers": (None,), "prompt_lookup_num_tokens": (None,), "prefill_chunk_size": (None,),
    "output_attentions": (None, False), "output_hidden_states": (None, False), "assistant_model": (None,),
    "assistant_early_exit": (None,), "past_key_values": (None,), "inputs_embeds": (None,), "custom_generate": (None,),
    "constraints": (None,), "force_words_ids": (None,), "num_beam_groups": (None, 1), "synced_gpus": (None, False),
}


@dataclass(frozen=True)
class Layer:
    """The parts of one layer of the text tower."""

    attention_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass
class State:
    """A batch that is being generated. keys, values: of each layer [B, KV heads, L, head_dim]; cos, sin [L - prompt, B,
    head_dim]; start int64 [B]: the first place of each row that is no padding; place int64 [1]: that of the next token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor
    start: Tensor
    place: Tensor


class Decoder:
    """The text tower of an injected model, taken apart. Raises LookupError, in words, where it is not as the policy's
    `decoder` says."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        modules = {plan.policy.published(name): module for name, module in model.named_modules()}
        names, stack = plan.policy.decoder, plan.geometry.text_stack
        count = plan.geometry.layers[stack]
        try:
            parts = {name: [modules[f"{stack}.{i}.{getattr(names, name)}"] for i in range(count)]
                     for name in Layer.__dataclass_fields__}
            acts = [modules[f"{stack}.{i}.{names.mlp}"].act_fn for i in range(count)]
            self.embedding, self.rotary = modules[names.embedding], modules[names.rotary]
            self.norm, self.head = modules[names.norm], modules[names.head]
            self.eps = float(self.norm.variance_epsilon)
        except (KeyError, AttributeError) as missing:
            raise LookupError(f"this release has no {missing} in {type(model).__name__}") from None
        probe = torch.linspace(-3, 3, 16)
        if not all(torch.equal(act(probe), F.silu(probe)) for act in acts):
            raise LookupError("the MLP's activation is not SiLU")
        config: Any = model.config
        if getattr(config.get_text_config(), "use_sliding_window", False):
            raise LookupError("the model attends to a sliding window")
        self.layers = [Layer(**{name: found[i] for name, found in parts.items()}) for i in range(count)]
        self.whole = [modules[f"{stack}.{i}"] for i in range(count)]
        self.scale = plan.geometry.attention["text"].head_dim ** -0.5
        self.device = next(model.parameters()).device
        self.ops = fused.operators(self.device.type)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """ids int64 [B]: each row's newest token -> logits [B, vocab] of the next. Fills `state` at its place."""
        ops, step = self.ops, state.place - (state.keys[0].shape[2] - state.cos.shape[0])
        cos, sin = state.cos[step][0], state.sin[step][0]
        x = self.embedding.look_up(ids)
        layer = self.layers[0]
        h = ops.rms_norm(x, layer.attention_norm.weight, self.eps)
        for i, layer in enumerate(self.layers):
            a = ops.attend(layer.q.forward(h), layer.k.forward(h), layer.v.forward(h), cos, sin, state.keys[i],
                           state.values[i], state.start, state.place, self.scale)
            h = ops.add_rms_norm(x, layer.o.forward(a), layer.mlp_norm.weight, self.eps)
            h = layer.down.forward(ops.silu_mul(layer.gate.forward(h), layer.up.forward(h)))
            after = self.layers[i + 1].attention_norm if i + 1 < len(self.layers) else self.norm
            h = ops.add_rms_norm(x, h, after.weight, self.eps)
        state.place += 1
        logits: Tensor = self.head.forward(h)
        return logits

    def prefill(self, forward: Callable[[], Any], mask: Tensor, length: int) -> tuple[Tensor, State]:
        """Run the model's own forward over the prompt -> its last logits [B, vocab] and the state after it.

        mask: int64 [B, prompt], 0 for the padding on the left; length: places of the cache.
        """
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

        reading = Reading(self, mask, length)
        hook = self.rotary.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with reading.instead():
                output = forward()
        finally:
            hook.remove()
        batch, prompt = mask.shape
        keys, values = reading.keys, reading.values
        for i in range(len(keys), len(self.layers)):  # none, or all of them
            for to, old in zip((keys, values), _cached(output.past_key_values, i), strict=True):
                # torch multiplies what it masks by zero: nothing there may be no number
                make = old.new_zeros if self.ops is fused.Plain else old.new_empty
                new = make(batch, old.shape[1], length, old.shape[3])
                new[:, :, :prompt] = old
                to.append(new)
        # the next position is one after the largest of the prompt, whose pictures take fewer positions than tokens
        largest = (seen[-1] * mask).amax(-1)
        if largest.ndim == 2:
            largest = largest.amax(0)
        positions = largest[:, None] + 1 + torch.arange(length - prompt, device=mask.device)
        if seen[-1].ndim == 3:
            positions = positions.expand(seen[-1].shape[0], -1, -1)
        cos, sin = self.rotary(keys[0], positions)
        cos, sin = (t[0] if t.ndim == 4 else t for t in (cos, sin))  # of a new token all three coordinates are equal
        start = prompt - mask.sum(-1)
        place = torch.tensor([prompt], device=mask.device)
        cos, sin = cos.transpose(0, 1).contiguous(), sin.transpose(0, 1).contiguous()
        return output.logits[:, -1], State(keys, values, cos, sin, start, place)


class Reading:
    """The layers of the text tower over a prompt, on CPU: what their own forwards compute, with a step's operators;
    keys and values go to their places in `State`. Of the last layer only the last position is computed: nobody asks
    for other logits. What is around the layers (pictures, positions, rotary tables) stays Transformers'.

    keys, values: as in `State`, of every layer; of none where the layers' own forwards ran.
    """

    def __init__(self, decoder: Decoder, mask: Tensor, length: int) -> None:
        self.decoder, self.length = decoder, length
        self.start = (mask.shape[1] - mask.sum(-1)).tolist()
        self.keys, self.values = list[Tensor](), list[Tensor]()

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within, a layer's forward is this one, unless somebody has put hooks or a forward of theirs into a layer."""
        layers = self.decoder.whole
        inside = [module for layer in layers for module in layer.modules()]
        touched = any(m._forward_hooks or m._forward_pre_hooks for m in inside) \
            or any("forward" in m.__dict__ for m in inside)
        if self.decoder.ops is fused.Plain or touched:
            yield
            return
        try:
            for i, layer in enumerate(layers):
                layer.forward = partial(self.layer, i, layer.forward)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def layer(self, i: int, own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [B, S, hidden] -> the same, of the last layer [B, 1, hidden]; of a release whose layers get rotary tables
        that are not yet those of the positions, what `own` returns."""
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        if args or cos is None or sin is None or cos.ndim != 3:
            return own(x, *args, **kwargs)
        decoder, layer, ops = self.decoder, self.decoder.layers[i], self.decoder.ops
        h = ops.rms_norm(x, layer.attention_norm.weight, decoder.eps)
        q, k, v = (part.forward(h) for part in (layer.q, layer.k, layer.v))
        last = i + 1 == len(decoder.layers)
        a = self.attend(q, k, v, cos.float(), sin.float())
        x, a = (t[:, -1:].contiguous() if last else t for t in (x.clone(), a))
        h = ops.add_rms_norm(x, layer.o.forward(a), layer.mlp_norm.weight, decoder.eps)
        return x.add_(layer.down.forward(ops.silu_mul(layer.gate.forward(h), layer.up.forward(h))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [B, S, heads * D], k, v [B, S, KV heads * D], not rotated; cos, sin float32 [B, S, D] -> like q, zero where
        a row is padding."""
        dim, out = cos.shape[-1], torch.zeros_like(q)
        q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))
        for part in (q, k):
            torch.ops.qwenvl_tp.rotate(part.view(-1, *part.shape[2:]), cos.flatten(0, 1), sin.flatten(0, 1))
        for to, new in ((self.keys, k), (self.values, v)):
            to.append(new.new_empty(len(new), new.shape[2], self.length, dim))
            to[-1][:, :, :new.shape[1]] = new.transpose(1, 2)
        for b, start in enumerate(self.start):
            mine, keys, values = (t[b, start:].transpose(0, 1) for t in (q, k, v))
            out[b, start:] = attend_causal(mine, keys, values, self.decoder.scale).flatten(1)
        return out


def _cached(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, KV heads, S, head_dim] of one layer of a DynamicCache of any release."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


class LeanGenerate:
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
        """The text tower taken apart, or why it cannot be; asked once the model is where it computes."""
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
        for name, right in PLAIN.items():
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
        logits, state = decoder.prefill(lambda: _forward(model, input_ids, model_kwargs), mask,
                                        max(generation_config.max_length, input_ids.shape[1] + 1))
        step: Callable[[Tensor], Tensor] = partial(decoder.step, state=state)
        if self.graphs:
            step = Graphed(step, get_accelerator())
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
