"""Where tensors are when the model is on a GPU, on a machine without one: torch's fake tensors have devices and shapes
but no numbers, and an operator refuses those of two devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adapter.engine import on_the_models_device
from adapter.generation.decoder import Decoder
from adapter.generation.kv_cache import Buffers, Room
from adapter.generation.prefill import PromptCache, allocate, fill_rotary_tables
from adapter.kernels.fused import TorchOps

HIDDEN, DIM, HEADS, KV_HEADS, MLP, VOCAB = 12, 4, 3, 1, 8, 11


@pytest.fixture
def gpu():
    with FakeTensorMode(), torch.no_grad():
        yield torch.device("cuda:0")


def decoder(device):
    """A decoder's modules, on the device."""
    def linear(inputs, outputs):
        return torch.nn.Linear(inputs, outputs, device=device)

    def norm(width=HIDDEN):
        return SimpleNamespace(weight=torch.ones(width, device=device))

    def rotary(x, positions):
        angles = positions[..., None].float() * torch.ones(DIM, device=x.device)
        return angles.cos(), angles.sin()

    layer = SimpleNamespace(
        sparse=None,
        attention_norm=norm(), q_norm=norm(DIM), k_norm=norm(DIM), q=linear(HIDDEN, HEADS * DIM),
        k=linear(HIDDEN, KV_HEADS * DIM), v=linear(HIDDEN, KV_HEADS * DIM), o=linear(HEADS * DIM, HIDDEN),
        mlp_norm=norm(), gate=linear(HIDDEN, MLP), up=linear(HIDDEN, MLP), down=linear(MLP, HIDDEN))
    words = torch.nn.Embedding(VOCAB, HIDDEN, device=device)
    made = Decoder.__new__(Decoder)
    vars(made).update(ops=TorchOps, layers=[layer] * 2, embedding=SimpleNamespace(look_up=words), norm=norm(),
                      head=linear(HIDDEN, VOCAB), rotary=rotary, eps=1e-6, scale=DIM ** -0.5, head_dim=DIM,
                      kv_heads=KV_HEADS)
    return made


def test_fake_tensors_refuse_two_devices(gpu):
    """What these tests rest on."""
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=gpu) @ torch.ones(2)


@pytest.mark.parametrize("room", [Room.exact(2, 5, 9), Room.bucket(3, 9)], ids=["exact", "bucket"])
def test_a_prompts_cache_and_the_steps_after_it_are_on_the_models_device(gpu, room):
    parts, mask = decoder(gpu), torch.ones(2, 5, dtype=torch.int64, device=gpu)
    cache = allocate(parts, mask, room, Buffers())
    prompt = PromptCache(cache.write)
    for i in range(2):
        prompt.update(*(torch.ones(2, KV_HEADS, 5, DIM, device=gpu) for _ in range(2)), i)
    fill_rotary_tables(parts, cache, torch.ones(3, 2, 5, dtype=torch.int64, device=gpu), mask)
    for filled in (6, 7):
        cache.attended = filled
        logits = parts.step(torch.ones(room.rows, dtype=torch.int64, device=gpu), cache)
        assert logits.device == gpu and logits.shape == (room.rows, VOCAB)
    held = (*cache.keys, *cache.values, cache.cos, cache.sin, cache.first, cache.prompt, cache.place)
    assert {tensor.device for tensor in held} == {gpu}


@pytest.mark.parametrize("by_name", [True, False])
def test_inputs_on_the_cpu_go_to_the_models_device_and_tokens_come_back(gpu, by_name):
    model, seen = torch.nn.Linear(2, 2, device=gpu), []

    def generate(*inputs, **kwargs):
        seen.extend(x.device for x in (*inputs, *kwargs.values(), *kwargs.get("nested", ())) if hasattr(x, "device"))
        return GenerateDecoderOnlyOutput(sequences=torch.ones(1, 4, device=gpu),
                                         logits=(torch.ones(1, 9, device=gpu),))

    ids, pixels = torch.ones(1, 3), torch.ones(4, 5)
    inputs = {"input_ids": ids} if by_name else {}
    out = on_the_models_device(model, generate)(*([] if by_name else [ids]), **inputs, pixel_values=pixels,
                                                nested=[pixels], max_new_tokens=4)
    assert seen == [gpu] * 3
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert {out.sequences.device.type, out.logits[0].device.type} == {"cpu"}


def test_inputs_that_are_there_stay_as_they_are(gpu):
    model, kept = torch.nn.Linear(2, 2, device=gpu), torch.ones(1, 3, device=gpu)
    assert on_the_models_device(model, lambda input_ids: input_ids)(input_ids=kept) is kept
