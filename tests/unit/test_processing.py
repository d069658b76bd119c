"""Prompts, pictures and films to tensors: right ones, and a RequestError with a reason for every wrong one."""

from __future__ import annotations

import base64
import shutil
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adapter import media, processing
from adapter.config import parse_request
from adapter.media import load_image, sample
from adapter.processing import RequestError, RequestProcessor, collate
from adapter.schema import Processor
from policies.errors import UserError

CHECKPOINT = Path(__file__).parents[2] / "launch" / "demo" / "checkpoint"
TRANSFORMERS = Version(transformers.__version__)
LIMITS = Processor(min_pixels=28 * 28, max_pixels=112 * 112)
SIZE = (84, 56)  # width and height: 3 x 2 merged patches, as it stands


def picture(path: Path, size=SIZE, seed=0, **how) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return str(path)


def film(path: Path, levels, rate=4, size=SIZE, codec="mpeg4") -> str:
    """A film of even frames, each of one grey level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1  # the grey levels shall survive
        for level in levels:
            frame = np.full((size[1], size[0], 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def data_url(path: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures and films of every kind that the tests use, by name."""
    home = tmp_path_factory.mktemp("media")
    made = {"a": picture(home / "a.png"), "b": picture(home / "b.png", (56, 112), 1)}
    made["long"] = film(home / "long.mp4", range(0, 200, 5))  # 40 frames, 10 seconds
    for n in (1, 2, 3, 5):
        made[f"film{n}"] = film(home / f"film{n}.mp4", range(0, 40 * n, 40))
    made["a_url"], made["film3_url"] = data_url(made["a"], "image/png"), data_url(made["film3"], "video/mp4")
    made["home"] = str(home)
    return made


@pytest.fixture(scope="module")
def processor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RequestProcessor(CHECKPOINT, LIMITS, max_prompt_tokens=2000)


def ask(processor, prompt="what?", id="r", **rest):
    return processor.prepare(parse_request({"id": id, "prompt": prompt, **rest}))


def reason(processor, **request) -> str:
    with pytest.raises(RequestError) as caught:
        ask(processor, **request)
    assert caught.value.request_id == "r"
    assert str(caught.value) == f"request 'r': {caught.value.reason}"
    return caught.value.reason


# ---- what comes out


@pytest.mark.parametrize(
    ("media", "grids"),
    [
        ({}, {}),
        ({"images": ["a"]}, {"image": [[1, 4, 6]]}),
        ({"images": ["a", "b"]}, {"image": [[1, 4, 6], [1, 8, 4]]}),
        ({"images": ["a_url"]}, {"image": [[1, 4, 6]]}),
        ({"videos": ["film3"]}, {"video": [[2, 4, 6]]}),
        ({"videos": ["film3_url"]}, {"video": [[2, 4, 6]]}),
        ({"videos": [["a", "a", "a"]]}, {"video": [[2, 4, 6]]}),
        ({"images": ["b"], "videos": ["long", "film2"]}, {"image": [[1, 8, 4]], "video": [[10, 4, 6], [1, 4, 6]]}),
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


def test_the_prompt_is_the_chat_templates(processor, files):
    tokenizer = processor._processor.tokenizer
    text = tokenizer.decode(ask(processor, "What?", images=[files["a"]], system="Be brief.").tensors["input_ids"][0])
    pads = "<|image_pad|>" * 6
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{pads}<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_are_the_same_as_a_prompt(processor, files):
    parts = [{"type": "image_url", "image_url": {"url": files["a_url"]}}, {"type": "video", "video": files["film2"]}]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    by_chat = processor.prepare(parse_request({"id": "x", "messages": chat}))
    by_prompt = ask(processor, images=[files["a"]], videos=[files["film2"]])
    assert by_chat.id == "x"
    for key, tensor in by_prompt.tensors.items():
        assert torch.equal(by_chat.tensors[key], tensor), key


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    ("request_limits", "section", "limits"),
    [
        ({}, {}, (12544, 12544)),  # the checkpoint's own
        ({}, {"min_pixels": 3136, "max_pixels": 6272}, (3136, 6272)),
        ({}, {"max_pixels": 50176}, (12544, 50176)),
        ({"min_pixels": 25088, "max_pixels": 50176}, {"min_pixels": 3136, "max_pixels": 6272}, (25088, 50176)),
        ({"max_pixels": 3136}, {"min_pixels": 784, "max_pixels": 6272}, (784, 3136)),
    ],
)
def test_pixel_limits_request_over_section_over_checkpoint(files, tmp_path, kind, request_limits, section, limits):
    file = picture(tmp_path / "p.png", (300, 200)) if kind == "images" else files["film2"]
    width, height = (300, 200) if kind == "images" else SIZE
    processor = RequestProcessor(CHECKPOINT, Processor(**section), 2000)
    grid = ask(processor, **{kind: [file]}, **request_limits).tensors[f"{kind[:-1]}_grid_thw"]
    rows, columns = (side // 14 for side in smart_resize(height, width, 28, *limits))
    assert grid.tolist() == [[1, rows, columns]]


def test_limits_of_one_request_do_not_stay(files):
    processor = RequestProcessor(CHECKPOINT, Processor(min_pixels=784), 2000)
    before = ask(processor, images=[files["b"]]).tensors["image_grid_thw"].tolist()
    assert ask(processor, images=[files["b"]], max_pixels=1568).tensors["image_grid_thw"].tolist() != before
    assert ask(processor, images=[files["b"]]).tensors["image_grid_thw"].tolist() == before


@pytest.mark.parametrize("family", ["Qwen2_5_VLProcessor"])
def test_other_tensors_of_a_family_are_kept(files, tmp_path, family):
    for file in CHECKPOINT.glob("*.json"):
        text = file.read_text().replace("Qwen2VLProcessor", family).replace('"qwen2_vl"', '"qwen2_5_vl"')
        if "index" not in file.name:
            (tmp_path / file.name).write_text(text)
    shutil.copy(CHECKPOINT / "merges.txt", tmp_path)
    processor = RequestProcessor(tmp_path, Processor(min_pixels=784, max_pixels=12544, fps=1.0), 2000)
    a = ask(processor, videos=[files["long"]]).tensors  # 40 frames of 10 seconds, 10 of them: 2 seconds in each patch
    b = ask(processor, videos=[files["film2"]]).tensors
    batch = collate([ask(processor, videos=[files["long"], files["film2"]]), ask(processor)], processor.pad_token_id)
    assert a["second_per_grid_ts"].tolist() == pytest.approx([2.0])
    assert b["second_per_grid_ts"].tolist() == pytest.approx([0.5])
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2.0, 0.5])


# ---- pictures


def test_modes_become_rgb(tmp_path):
    def saved(image: Image.Image, name: str, **how) -> np.ndarray:
        image.save(tmp_path / name, **how)
        return np.asarray(load_image(str(tmp_path / name)))

    red = Image.new("RGB", (4, 2), (255, 0, 0))
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert (saved(red.convert("L"), "l.png") == 76).all()
    assert (saved(red.convert("P"), "p.png") == (255, 0, 0)).all()
    assert (saved(red.convert("1"), "1.png") == np.asarray(red.convert("1").convert("RGB"))).all()
    assert (saved(clear, "clear.png") == 255).all()  # what is transparent is white, not the colour under it
    assert (saved(Image.new("RGBA", (4, 2), (255, 0, 0, 128)), "half.png")[0, 0] == (255, 127, 127)).all()
    assert (saved(Image.new("LA", (4, 2), (0, 0)), "la.png") == 255).all()
    assert (saved(red.convert("P"), "p_clear.png", transparency=red.convert("P").getpixel((0, 0))) == 255).all()
    for dtype, name in ((np.uint16, "16.png"), (np.uint16, "16.tiff"), (np.int32, "32.tiff")):
        deep = Image.fromarray(np.full((2, 4), 0x8000, dtype))
        assert (saved(deep, name) == 0x80).all(), name
    cmyk = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "cmyk.jpg")
    assert (np.abs(cmyk.astype(int) - (255, 0, 0)) < 4).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255  # the corner tells all eight apart, with the shape
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "e.png", exif=exif)
    corner = {1: (0, 0), 2: (0, 2), 3: (1, 2), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (2, 1), 8: (2, 0)}[orientation]
    seen = np.asarray(load_image(str(tmp_path / "e.png")))
    assert seen.shape == ((2, 3, 3) if orientation < 5 else (3, 2, 3))
    assert [tuple(map(int, at)) for at in np.argwhere(seen[..., 0])] == [corner]


def bad_pictures(home: Path) -> dict[str, tuple[str, str]]:
    """name -> (what is given as an image, words of the reason)"""
    good = Path(picture(home / "good.png", (64, 64)))
    jpeg = Path(picture(home / "good.jpg", (64, 64)))
    for name, data in {
        "cut.png": good.read_bytes()[:2000],
        "cut.jpg": jpeg.read_bytes()[:1500],
        "empty.png": b"",
        "text.png": b"not a picture",
        "post.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }.items():
        (home / name).write_bytes(data)
    Image.new("1", (10_000, 10_000)).save(home / "bomb.png")
    Image.new("1", (20_000, 20_000)).save(home / "bomb2.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(home / "float.tiff")
    picture(home / "thin.png", (6000, 28))
    with_url = f"data:image/png;base64,{base64.b64encode(b'nothing').decode()}"
    path = {name: str(home / name) for name in [p.name for p in home.iterdir()]}
    return {
        "missing": (str(home / "gone.png"), "no such file"),
        "directory": (str(home), "not a regular file"),
        "device": ("/dev/zero", "not a regular file"),
        "nul": (str(home / "a\0b.png"), "b.png"),
        "truncated png": (path["cut.png"], "cannot be decoded"),
        "truncated jpeg": (path["cut.jpg"], "truncated"),
        "empty": (path["empty.png"], "empty"),
        "text": (path["text.png"], "not a picture of a known format: PNG"),
        "program": (path["post.eps"], "not a picture of a known format"),
        "bomb": (path["bomb.png"], "10000 x 10000 pixels are too many"),
        "bigger bomb": (path["bomb2.png"], "400000000 pixels"),
        "float": (path["float.tiff"], "floating-point"),
        "thin": (path["thin.png"], "6000 x 28 pixels"),
        "http": ("https://example.com/x.png", "only local paths and data: URLs"),
        "ftp": ("FTP://example.com/x.png", "only local paths and data: URLs"),
        "url that is no picture": (with_url, "not a picture"),
        "url of text": ("data:text/plain;base64,aGk=", "must read data:image/"),
        "url of a film": ("data:video/mp4;base64,aGk=", "must read data:image/"),
        "url without base64": ("data:image/png,abc", "must read data:image/"),
        "url with bad base64": ("data:image/png;base64,aG!k=", "not valid base64"),
        "url with short base64": ("data:image/png;base64,abcde", "not valid base64"),
        "url that is not ascii": ("data:image/png;base64,ä", "not valid base64"),
        "url of nothing": ("data:image/png;base64,", "not a picture"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_named_with_a_reason(processor, tmp_path):
    for name, (value, words) in bad_pictures(tmp_path).items():
        told = reason(processor, images=[value])
        assert words in told, (name, told)
        assert len(told) < 600, name


def test_a_picture_too_small_for_a_patch_is_scaled_or_refused_in_words(processor, tmp_path):
    tiny = picture(tmp_path / "tiny.png", (1, 1))
    if Version("4.52") <= TRANSFORMERS:
        assert ask(processor, images=[tiny]).tensors["image_grid_thw"].tolist() == [[1, 2, 2]]
    else:
        assert "1 x 1 pixels" in reason(processor, images=[tiny])


# ---- films


def test_sample_like_qwen():
    assert sample(40, 4, 2, 768, 2) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39]
    assert sample(100, 25, 2, 768, 2) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert sample(100, 100, 2, 768, 2) == [0, 33, 66, 99]  # one second: four at the least
    assert sample(100, 25, 2, 5, 2) == [0, 33, 66, 99]
    assert sample(100, 25, 2, 2, 2) == [0, 99]
    assert sample(7, 1, 2, 768, 2) == [0, 1, 2, 4, 5, 6]
    assert [sample(n, 25, 2, 768, 2) for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_sample_holds_its_promises():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        total, most = int(rng.integers(1, 400)), int(rng.integers(2, 60))
        rate, fps = rng.uniform(0.1, 120), rng.uniform(0.05, 30)
        picked = sample(total, rate, fps, most, 2)
        assert picked == sorted(set(picked)) and picked[0] >= 0 and picked[-1] < total
        assert len(picked) <= most
        assert len(picked) % 2 == 0 or total < 4
        assert len(picked) >= min(total, 4, most // 2 * 2)
        assert picked[-1] == total - 1 or len(picked) == 1


def levels(tensors) -> list[float]:
    """The grey level of each frame of one film, from its normalised patches [rows, 3 * 2 * 14 * 14]."""
    grid = tensors["video_grid_thw"][0].tolist()
    red = tensors["pixel_values_videos"].reshape(grid[0], grid[1] * grid[2], 3, 2, 14 * 14)[:, :, 0]
    return ((red.mean(dim=(1, 3)) * 0.26862954 + 0.48145466) * 255).flatten().tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("long", [5 * i for i in sample(40, 4, 2, 768, 2)]),
        ("film5", [0, 40, 120, 160]),
        ("film3", [0, 40, 80, 80]),
        ("film2", [0, 40]),
        ("film1", [0, 0]),
    ],
)
def test_the_right_frames_are_taken(processor, files, name, expected):
    assert levels(ask(processor, videos=[files[name]]).tensors) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("section", [{"fps": 1.0}, {"max_frames": 10}, {"max_frames": 11}])
def test_fps_and_max_frames(files, section):
    processor = RequestProcessor(CHECKPOINT, LIMITS.model_copy(update=section), 2000)
    expected = [5 * i for i in sample(40, 4, 1, 768, 2)]  # ten frames by any of these
    assert levels(ask(processor, videos=[files["long"]]).tensors) == pytest.approx(expected, abs=4)
    frames = [[files["a"]] * 25]
    wanted = 26 if "fps" in section else 10
    assert ask(processor, videos=frames).tensors["video_grid_thw"].tolist() == [[wanted // 2, 4, 6]]


def test_a_short_film_is_filled_with_its_last_frame(processor, files):
    film = processor._load_film(files["film3"], processor._processor, 0)
    assert (film.frames.shape, film.indices, film.total, film.rate) == ((4, 56, 84, 3), [0, 1, 2, 2], 3, 4.0)
    assert (film.frames[3] == film.frames[2]).all()


def test_only_the_frames_that_are_needed_are_kept(processor, files, monkeypatch):
    kept = []
    monkeypatch.setattr(media, "_shrunk", lambda image, part: kept.append(1) or np.asarray(image))
    ask(processor, videos=[files["long"]])
    assert len(kept) == 20


def test_frames_above_the_limit_are_shrunk_as_they_come(processor, tmp_path, monkeypatch):
    big = film(tmp_path / "big.mp4", range(0, 160, 10), size=(336, 224))
    shapes = []
    film_of = media._film
    monkeypatch.setattr(media, "_film", lambda new, *rest: shapes.append(new[0].shape) or film_of(new, *rest))
    grids = {}
    for low in (784, 12544):  # with the second, shrinking would leave less than the least: the processor does it all
        grids[low] = ask(processor, videos=[big], min_pixels=low, max_pixels=12544).tensors["video_grid_thw"].tolist()
        assert grids[low] == [[4, *(side // 14 for side in smart_resize(224, 336, 28, low, 12544))]]
    assert shapes == [(84, 112, 3), (224, 336, 3)]


def test_packets_that_are_never_shown(processor, files, monkeypatch):
    """The packets promise 49 frames and 40 come: these are spread over the film as if 40 had been promised."""
    probe = media._probe
    monkeypatch.setattr(media, "_probe", lambda file: (49, *probe(file)[1:]))
    expected = [5 * i for i in sample(40, 4, 2, 768, 2)]
    assert levels(ask(processor, videos=[files["long"]]).tensors) == pytest.approx(expected, abs=4)


def test_a_film_turned_by_its_container_is_upright(processor, tmp_path):
    path = Path(film(tmp_path / "turned.mp4", [0] * 4, size=(112, 56)))
    data = path.read_bytes()
    upright = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    clockwise = b"".join(n.to_bytes(4, "big") for n in (0, 1 << 16, 0, 0xFFFF0000, 0, 0, 56 << 16, 0, 1 << 30))
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + clockwise + data[at + 36 :])
    assert ask(processor, videos=[str(path)]).tensors["video_grid_thw"].tolist() == [[2, 8, 4]]


def bad_films(home: Path, files) -> dict[str, tuple[object, str]]:
    good = Path(files["long"]).read_bytes()
    cut, empty, text, silent = (home / f"{name}.mp4" for name in ("cut", "empty", "text", "silent"))
    playlist = Path(files["home"]) / "playlist.mp4"
    cut.write_bytes(good[: len(good) // 2])
    empty.write_bytes(b"")
    text.write_bytes(b"not a film")
    playlist.write_text("ffconcat version 1.0\nfile 'long.mp4'\n")  # a film that has FFmpeg open another file
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "missing": (str(home / "gone.mp4"), "no such file"),
        "truncated": (str(cut), "cannot be decoded"),
        "empty": (str(empty), "the file is empty"),
        "text": (str(text), "cannot be decoded"),
        "playlist": (str(playlist), "cannot be decoded"),
        "sound only": (str(silent), "not one frame"),
        "http": ("http://example.com/x.mp4", "only local paths and data: URLs"),
        "url of a picture": (files["a_url"], "must read data:video/"),
        "url of nothing": ("data:video/mp4;base64,", "cannot be decoded"),
        "frames of two sizes": ([files["a"], files["b"]], "not of the same size"),
        "a missing frame": ([files["a"], "/gone.png"], "no such file"),
    }


def test_bad_films_are_named_with_a_reason(processor, files, tmp_path):
    for name, (value, words) in bad_films(tmp_path, files).items():
        told = reason(processor, videos=[value])
        assert words in told, (name, told)


# ---- what is asked


@pytest.mark.parametrize("media", ["images", "videos", None])
@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_an_error_also_beside_a_picture(processor, files, media, prompt):
    file = {"images": files["a"], "videos": files["film2"]}
    assert "the prompt is empty" in reason(processor, prompt=prompt, **({media: [file[media]]} if media else {}))


def test_an_empty_chat_is_an_error(processor, files):
    chat = [{"role": "system", "content": "hi"}, {"role": "user", "content": [{"type": "image", "image": files["a"]}]}]
    with pytest.raises(RequestError, match="the prompt is empty"):
        processor.prepare(parse_request({"id": "r", "messages": chat}))


def special_tokens() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoProcessor.from_pretrained(CHECKPOINT).tokenizer
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def test_special_tokens_in_the_text_are_an_error(processor, files):
    names = special_tokens()
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"} <= set(names)
    for name in [*names, "<|placeholder|>"]:
        assert repr(name) in reason(processor, prompt=f"what is{name}?")
        assert repr(name) in reason(processor, system=name)
    parts = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]
    with pytest.raises(RequestError, match="a meaning of its own"):  # the template would put the halves together
        processor.prepare(parse_request({"id": "r", "messages": [{"role": "user", "content": parts}]}))
    ask(processor, prompt="a < b | c > d <image> </s> [INST]")
    assert reason(processor, prompt="half a character \ud800")


def test_prompts_that_are_too_long_name_both_numbers(processor, files, monkeypatch):
    assert ask(processor, "word " * 300).prompt_tokens < 2000
    told = reason(processor, prompt="word " * 3000)
    assert "at most 2000 fit" in told and int(told.split()[3]) > 3000, told
    exact = ask(processor, images=[files["a"]]).prompt_tokens
    assert ask(RequestProcessor(CHECKPOINT, LIMITS, exact), images=[files["a"]]).prompt_tokens == exact
    less = RequestProcessor(CHECKPOINT, LIMITS, exact - 1)
    assert f"{exact} tokens, and at most {exact - 1} fit" in reason(less, images=[files["a"]])


def test_pictures_and_films_that_are_too_many_are_refused_before_work_is_done(files, monkeypatch):
    small = RequestProcessor(CHECKPOINT, LIMITS, 50)
    monkeypatch.setattr(media, "_decode", lambda *_: pytest.fail("decoded"))
    assert "20 frames of 84 x 56 it has at least 60 tokens" in reason(small, videos=[files["long"]])
    assert "it has at least 60 tokens" in reason(small, videos=[[files["a"]] * 20])
    monkeypatch.setattr(type(small), "_render", lambda *_: pytest.fail("went on"))
    assert "54 tokens, and at most 50 fit" in reason(small, images=[files["a"]] * 9)


@pytest.mark.parametrize(
    ("limits", "section"),
    [({"min_pixels": 50000}, {}), ({"max_pixels": 3136}, {}), ({"min_pixels": 9000}, {"max_pixels": 8000})],
)
def test_limits_that_contradict_each_other_across_sources(files, limits, section):
    told = reason(RequestProcessor(CHECKPOINT, Processor(**section), 2000), images=[files["a"]], **limits)
    assert "min_pixels = " in told and "is above max_pixels = " in told


def test_limits_that_leave_nothing(processor, tmp_path):
    thin = picture(tmp_path / "thin.png", (2800, 28))
    try:
        grid = ask(processor, images=[thin], min_pixels=1, max_pixels=784).tensors["image_grid_thw"]
        assert int(grid.prod()) > 0
    except RequestError as error:  # releases before 4.57
        assert "raise max_pixels" in error.reason


def test_what_a_library_raises_becomes_a_request_error(processor, monkeypatch):
    def broken(error):
        def render(*_):
            raise error

        monkeypatch.setattr(RequestProcessor, "_render", render)

    for error in (RuntimeError("odd shape"), KeyError("k"), AssertionError("no"), RecursionError("deep")):
        broken(error)
        assert type(error).__name__ in reason(processor)
    for error in (MemoryError(), KeyboardInterrupt(), SystemExit(1)):
        broken(error)
        with pytest.raises(type(error)):
            ask(processor)


def test_a_template_that_leaves_pictures_out(processor, files, monkeypatch):
    monkeypatch.setattr(RequestProcessor, "_render", lambda *_: "no place for pictures")
    assert reason(processor, images=[files["a"]])


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "tokenizer.json", "chat_template.json", None])
def test_a_checkpoint_without_its_side_files(tmp_path, gone):
    for file in CHECKPOINT.iterdir():
        without = {gone} | ({"merges.txt", "vocab.json"} if gone == "tokenizer.json" else set())
        if gone and file.suffix in (".json", ".txt") and file.name not in without and "index" not in file.name:
            text = file.read_text()
            if gone == "chat_template.json" and file.name == "tokenizer_config.json":
                text = text.replace('"chat_template"', '"no_template"')
            (tmp_path / file.name).write_text(text)
    with pytest.raises(UserError, match="processor, tokenizer or chat template cannot be used") as caught:
        RequestProcessor(tmp_path, Processor(), 100)
    assert str(tmp_path) in str(caught.value)


# ---- batches


def mixed(files) -> list[dict[str, object]]:
    return [
        {"prompt": "a"},
        {"prompt": "what is in the picture?", "images": [files["a"]]},
        {"prompt": "what happens?", "videos": [files["film5"]]},
        {"prompt": "a longer question about two pictures and a film?", "images": [files["b"], files["a"]],
         "videos": [files["film3"]]},
        {"prompt": "what colour?"},
    ]  # fmt: skip


def test_collate_is_the_processors_own_batch(processor, files):
    """Against one call of the checkpoint's processor on the whole batch, which pads on the left itself."""
    requests = [parse_request({"id": str(i), **raw}) for i, raw in enumerate(mixed(files))]
    own = processor._with_limits(requests[0])
    part = processing._film_part(own)
    films, images, texts = [], [], []
    for request in requests:
        turns = request.turns()
        texts.append(processor._render(turns))
        images += [load_image(value) for value in request.images]
        films += [processor._load_film(value, own, 0).frames for value in request.videos]
    how = {"do_sample_frames": False} if part is not own.image_processor else {}
    theirs = own(
        text=texts, images=images, videos=films, padding=True, padding_side="left", return_tensors="pt", **how
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
