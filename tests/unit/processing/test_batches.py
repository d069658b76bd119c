"""The tensors of a request, and of several together: the processor's own batch, and the same answers."""

from __future__ import annotations

import shutil

import pytest
import torch
from media_and_requests import CHECKPOINT, TRANSFORMERS, ask
from transformers import AutoConfig, GenerationConfig, Qwen2VLForConditionalGeneration

from adapter.config.load import parse_request
from adapter.config.schema import Processor
from adapter.requests import processing
from adapter.requests.media import load_image
from adapter.requests.processing import RequestProcessor, collate


@pytest.mark.parametrize(
    ("media", "grids"),
    [
        ({}, {}),
        ({"images": ["a"]}, {"image": [[1, 4, 6]]}),
        ({"images": ["a", "b"]}, {"image": [[1, 4, 6], [1, 8, 4]]}),
        ({"images": ["a_url"]}, {"image": [[1, 4, 6]]}),
        ({"videos": ["video3"]}, {"video": [[2, 4, 6]]}),
        ({"videos": ["video3_url"]}, {"video": [[2, 4, 6]]}),
        ({"videos": [["a", "a", "a"]]}, {"video": [[2, 4, 6]]}),
        ({"images": ["b"], "videos": ["long", "video2"]}, {"image": [[1, 8, 4]], "video": [[10, 4, 6], [1, 4, 6]]}),
    ],
)
def test_tensors(processor, files, media, grids):
    named = {
        key: [files[v] if isinstance(v, str) else [files[f] for f in v] for v in values]
        for key, values in media.items()
    }
    prepared = ask(processor, **named)
    tensors = prepared.tensors
    ids = tensors["input_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (1, prepared.prompt_tokens)
    assert torch.equal(tensors["attention_mask"], torch.ones_like(ids))
    config = AutoConfig.from_pretrained(CHECKPOINT)
    expected = {"input_ids", "attention_mask"}
    for kind, suffix, token in (("image", "", config.image_token_id), ("video", "_videos", config.video_token_id)):
        grid = torch.tensor(grids.get(kind, []), dtype=torch.int64).reshape(-1, 3)
        assert int((ids == token).sum()) == int(grid.prod(-1).sum()) // 4
        if len(grid):
            expected |= {f"pixel_values{suffix}", f"{kind}_grid_thw"}
            assert torch.equal(tensors[f"{kind}_grid_thw"], grid)
            assert tensors[f"pixel_values{suffix}"].shape == (int(grid.prod(-1).sum()), 3 * 2 * 14 * 14)
            assert tensors[f"pixel_values{suffix}"].dtype == torch.float32
    if TRANSFORMERS.major >= 5:
        expected.add("mm_token_type_ids")
        types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        assert torch.equal(tensors["mm_token_type_ids"], types)
    assert set(tensors) == expected


@pytest.mark.parametrize("family", ["Qwen2_5_VLProcessor"])
def test_other_tensors_of_a_family_are_kept(files, tmp_path, family):
    for file in CHECKPOINT.glob("*.json"):
        text = file.read_text().replace("Qwen2VLProcessor", family).replace('"qwen2_vl"', '"qwen2_5_vl"')
        if "index" not in file.name:
            (tmp_path / file.name).write_text(text)
    shutil.copy(CHECKPOINT / "merges.txt", tmp_path)
    processor = RequestProcessor(tmp_path, Processor(min_pixels=784, max_pixels=12544, fps=1.0), 2000)
    a = ask(processor, videos=[files["long"]]).tensors  # 40 frames of 10 seconds, 10 of them: 2 seconds in each patch
    b = ask(processor, videos=[files["video2"]]).tensors
    batch = collate([ask(processor, videos=[files["long"], files["video2"]]), ask(processor)], processor.pad_token_id)
    assert a["second_per_grid_ts"].tolist() == pytest.approx([2.0])
    assert b["second_per_grid_ts"].tolist() == pytest.approx([0.5])
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2.0, 0.5])


def mixed(files) -> list[dict[str, object]]:
    return [
        {"prompt": "a"},
        {"prompt": "what is in the picture?", "images": [files["a"]]},
        {"prompt": "what happens?", "videos": [files["video5"]]},
        {"prompt": "a longer question about two pictures and a video?", "images": [files["b"], files["a"]],
         "videos": [files["video3"]]},
        {"prompt": "what colour?"},
    ]  # fmt: skip


def test_collate_is_the_processors_own_batch(processor, files):
    """Against one call of the checkpoint's processor on the whole batch, which pads on the left itself."""
    requests = [parse_request({"id": str(i), **raw}) for i, raw in enumerate(mixed(files))]
    own = processor._with_limits(requests[0])
    part = processing._video_processor(own)
    clips, images, texts = [], [], []
    for request in requests:
        turns = request.turns()
        texts.append(processor._render(turns))
        images += [load_image(value) for value in request.images]
        clips += [processor._load_video(value, own, processing._Room(2000)).frames for value in request.videos]
    how = {"do_sample_frames": False} if part is not own.image_processor else {}
    theirs = own(
        text=texts, images=images, videos=clips, padding=True, padding_side="left", return_tensors="pt", **how
    )
    ours = collate([processor.prepare(request) for request in requests], processor.pad_token_id)
    assert {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"} <= set(ours)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and tensor.shape == theirs[key].shape, key
        torch.testing.assert_close(tensor, theirs[key], msg=key)


def test_collate_alone_and_without_media(processor, files):
    alone = ask(processor, images=[files["a"]])
    for key, tensor in collate([alone], processor.pad_token_id).items():
        assert torch.equal(tensor, alone.tensors[key])
    two = [ask(processor, "a"), ask(processor, "a b c d e")]
    batch = collate(two, processor.pad_token_id)
    assert "pixel_values" not in batch
    assert batch["attention_mask"].sum(dim=1).tolist() == [item.prompt_tokens for item in two]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.pad_token_id).all()
    assert (batch["attention_mask"][0].diff() >= 0).all()  # on the left


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.torch_dtype = None
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_q" not in name:
                parameter.normal_(0, 0.08)
    return model


def test_a_batch_generates_what_its_requests_do_alone(processor, model, files):
    how = GenerationConfig(max_new_tokens=8, do_sample=False)
    how.pad_token_id = processor.pad_token_id
    how.eos_token_id = processor._processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])

    def answers(items):
        batch = collate(items, processor.pad_token_id)
        with torch.no_grad():
            new = model.generate(**batch, generation_config=how)[:, batch["input_ids"].shape[1] :]
        return [row.tolist() for row in new]

    prepared = [ask(processor, **raw) for raw in mixed(files)]
    alone = [answers([item])[0] for item in prepared]
    together = answers(prepared)
    assert len({tuple(row) for row in alone}) > 1  # the requests do differ
    for one, row in zip(alone, together, strict=True):
        assert row[: len(one)] == one
        assert set(row[len(one) :]) <= {processor.pad_token_id}


def test_decode_and_the_padding_token(processor):
    tokenizer = processor._processor.tokenizer
    ids = tokenizer(" red <|im_end|><|endoftext|>")["input_ids"]
    assert processor.decode(ids) == processor.decode(torch.tensor(ids)) == "red"
    assert processor.decode([]) == ""
    assert processor.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
