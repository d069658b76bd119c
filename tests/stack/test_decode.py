"""The decode loop in one process: Transformers' tokens, whatever is asked; what goes to their own; one graph.

This process becomes a rank, which is why it is not among the unit tests.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from checkpoints import cases, make_checkpoint
from decoding import SHAPE, TWELVE, lean, loop_of, started
from transformers.generation.streamers import BaseStreamer

import adapter
from adapter.config.load import from_dict
from adapter.generation.decoder import Decoder
from adapter.generation.loop import DecodeLoop
from adapter.generation.prefill import FastPrefill
from adapter.kernels import build


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("decode") / "m", SHAPE)


def started_from(directory, dtype="float32"):
    config = {"model": {"path": str(directory), "dtype": dtype}, "tensor_parallel": {"tp_size": 1}}
    return adapter.init_inference(from_dict(config, directory))


@pytest.fixture(scope="module")
def engine(directory):
    return started_from(directory)


@pytest.fixture
def fresh(directory):
    """An engine that nobody has asked for attentions: Transformers' hooks for those stay where they are."""
    return started_from(directory)


@pytest.fixture(scope="module")
def plain(directory):
    model = transformers.Qwen2VLForConditionalGeneration
    return model.from_pretrained(directory, torch_dtype=torch.float32).eval()


@pytest.fixture
def steps(engine, monkeypatch) -> list[int]:
    """A number for each lean step that a test makes."""
    seen: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, state: (seen.append(len(ids)), step(self, ids, state))[1])
    return seen


@lean
@pytest.mark.parametrize("case", ["text", "image", "two_images", "video", "batch"])
def test_greedy_tokens_are_transformers_own(engine, plain, steps, case):
    ours, theirs = (model.generate(**cases()[case], **TWELVE) for model in (engine, plain))
    assert torch.equal(ours, theirs)
    assert len(steps) == 11, "the prompt gives the first token, each step one more"


@lean
@pytest.mark.parametrize("more", [
    {"do_sample": True, "temperature": 1.3, "top_k": 20}, {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
    {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [10, 11, 12]},
    {"bad_words_ids": [[20], [30, 40]]}, {"min_new_tokens": 3, "eos_token_id": [100, 101, 102, 103, 104, 105, 106]},
    {"renormalize_logits": True, "do_sample": True, "min_p": 0.05},
], ids=lambda more: "-".join(more))
def test_processors_samples_and_ends_are_transformers_own(engine, steps, monkeypatch, more):
    """The same model in both loops, since an engine draws its seed from torch's, for all ranks alike."""
    results, made = [], []
    for other in (False, True):
        if other:
            monkeypatch.setattr(DecodeLoop, "why_not", lambda *_: "asked for")
        torch.manual_seed(11)
        results.append(engine.module.generate(**cases()["batch"], **{**TWELVE, **more}))
        made.append(len(steps))
    assert made[0] > 0 and made[1] == made[0] and torch.equal(*results)


@lean
def test_a_row_that_ended_is_padded_while_others_go_on(engine, plain):
    inputs = cases()["batch"]
    first = plain.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ends = {"eos_token_id": int(first[1, -2]), "pad_token_id": 0, "max_new_tokens": 9, "do_sample": False}
    ours, theirs = (model.generate(**inputs, **ends) for model in (engine, plain))
    assert torch.equal(ours, theirs) and int(ours[1, -1]) == 0, "the case must have a row that ends before another"


@lean
def test_logits_and_scores_are_given_as_asked(engine, plain, steps):
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "repetition_penalty": 1.2}
    ours, theirs = (model.generate(**cases()["image"], **TWELVE, **asked) for model in (engine, plain))
    assert steps and torch.equal(ours.sequences, theirs.sequences)
    for name in ("logits", "scores"):
        assert len(ours[name]) == 12
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
    assert not torch.equal(ours.logits[3], ours.scores[3])


@lean
def test_tokens_are_streamed_as_they_come(engine):
    seen: list[torch.Tensor] = []
    put = {"put": lambda self, value: seen.append(value.reshape(-1)),
           "end": lambda self: seen.append(torch.tensor([-1]))}
    out = engine.generate(**cases()["text"], **TWELVE, streamer=type("Streamer", (BaseStreamer,), put)())
    assert torch.equal(torch.cat(seen), torch.cat([out.reshape(-1), torch.tensor([-1])])) and len(seen) == 14


@lean
def test_a_stopping_criterion_stops(engine, steps):
    stop = transformers.StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 40)])
    out = engine.generate(**cases()["text"], **TWELVE, stopping_criteria=stop)
    assert out.shape[1] == 40 and len(steps) == 2


@pytest.mark.parametrize(("more", "words"), [
    ({"num_beams": 3}, "num_beams is 3"), ({"use_cache": False}, "use_cache"),
    ({"cache_implementation": "static"}, "cache_implementation"), ({"prompt_lookup_num_tokens": 3}, "prompt_lookup"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
])
def test_what_it_does_not_cover_goes_to_transformers_own_loop(engine, steps, monkeypatch, more, words):
    generate = loop_of(engine, monkeypatch)
    assert words in generate.why_not((), {**cases()["text"], **TWELVE, **more})
    if "use_cache" not in more and "cache_implementation" not in more:
        engine.generate(**cases()["text"], **TWELVE, **more)
        assert not steps


def test_padding_on_the_right_goes_to_transformers_own_loop(engine, steps):
    inputs = cases()["text"]
    inputs["attention_mask"][0, -2:] = 0
    engine.generate(**inputs, **TWELVE)
    assert not steps


@lean
@pytest.mark.parametrize("case", ["text", "two_images", "batch"])
def test_a_prompts_layers_run_with_a_steps_operators(engine, monkeypatch, case):
    """All of them, once each, and no forward of theirs: the tokens are compared above."""
    layers, read, own = engine.module.model.language_model.layers, [], FastPrefill.layer

    def layer(self, i, forward, *more, **kwargs):
        read.append(i)
        return own(self, i, lambda *_, **__: pytest.fail("its own forward"), *more, **kwargs)

    monkeypatch.setattr(FastPrefill, "layer", layer)
    engine.generate(**cases()[case], **TWELVE)
    assert read == [*range(len(layers))] and not any("forward" in layer.__dict__ for layer in layers)


@lean
def test_a_prompt_that_fails_leaves_the_layers_their_forwards(fresh, monkeypatch):
    monkeypatch.setattr(FastPrefill, "attend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fresh.generate(**cases()["text"], **TWELVE)
    monkeypatch.undo()
    assert not any("forward" in module.__dict__ for module in fresh.module.model.language_model.layers)


@lean
@pytest.mark.skipif(not build.unavailable() and not torch.ops.qwenvl_tp.attend_all_supported(),
                    reason="this processor lacks AVX-512 BF16")
@pytest.mark.parametrize("case", ["image", "two_images", "video"])
def test_pictures_in_half_precision_are_as_near_as_transformers_own(directory, plain, monkeypatch, case):
    """To those of float32; and by our attention, not by the release's."""
    half = started_from(directory, "bfloat16").module
    inputs = cases()[case]
    pixels, grid = ((inputs["pixel_values"], inputs["image_grid_thw"]) if "pixel_values" in inputs else
                    (inputs["pixel_values_videos"], inputs["video_grid_thw"]))

    def features(model):
        with torch.no_grad():
            return model.model.visual(pixels.to(model.dtype), grid_thw=grid).pooler_output.double()

    exact = features(plain)
    theirs = features(copy.deepcopy(plain).bfloat16())
    monkeypatch.setattr(type(plain.model.visual.blocks[0].attn), "forward", lambda *_, **__: pytest.fail("its own"))
    ours = features(half)
    assert float((ours - exact).norm()) < 1.2 * float((theirs - exact).norm())


@lean
def test_torch_operators_and_ours_make_the_same_step(engine):
    """What runs where there is no C++ is the same formula."""
    results = []
    for compiled in (None, False):
        decoder, ids, cache = started(engine, compiled)
        with torch.no_grad():
            results.append([decoder.step(ids, cache) for _ in range(3)])
    for ours, plain in zip(*results, strict=True):
        assert float((ours - plain).abs().max()) < 1e-4


@lean
def test_a_step_looks_at_what_is_filled_alone(engine):
    """Torch's operators, over so many places of the cache as have a token; what is beyond may be anything."""
    (whole, ids, cache), (part, _, other) = started(engine, False), started(engine, False)
    for tensor in (*other.keys, *other.values):
        tensor[:, :, int(other.place):] = torch.nan
    with torch.no_grad():
        for _ in range(4):
            other.attended = int(other.place) + 1
            logits = whole.step(ids, cache)
            assert float((part.step(ids, other) - logits).abs().max()) < 1e-5
            ids = logits.argmax(-1)


@lean
@pytest.mark.parametrize("compiled", [None, False], ids=["ours", "torch"])
def test_a_step_is_one_graph(engine, compiled):
    """torch.compile(fullgraph=True) takes it whole, and the compiled step, run thrice, gives the same logits."""
    eager, graph = started(engine, compiled), started(engine, compiled)
    step = torch.compile(graph[0].step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert float((eager[0].step(eager[1], eager[2]) - step(graph[1], graph[2])).abs().max()) < 1e-4
