"""Pictures to RGB pixels and patches: the right ones, and a reason for every wrong one."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from media_and_requests import CHECKPOINT, SIZE, TRANSFORMERS, ask, data_url, picture, reason
from packaging.version import Version
from PIL import Image, features
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adapter.config.schema import Processor
from adapter.requests.media import load_image
from adapter.requests.processing import RequestError, RequestProcessor


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
    file = picture(tmp_path / "p.png", (300, 200)) if kind == "images" else files["video2"]
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


def bad_files(home: Path) -> dict[str, tuple[str, str]]:
    """Name -> the path that is given as an image, and words of the reason."""
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
    path = {name: str(home / name) for name in [p.name for p in home.iterdir()]}
    return {
        "missing": (str(home / "gone.png"), "no such file"),
        "directory": (str(home), "not a regular file"),
        "device": ("/dev/zero", "not a regular file"),
        "nul": (str(home / "a\0b.png"), "b.png"),
        "truncated png": (path["cut.png"], "cannot be decoded"),
        "truncated jpeg": (path["cut.jpg"], "truncated"),
        "empty": (path["empty.png"], "empty"),
        "text": (path["text.png"], "not an image of a known format: PNG"),
        "program": (path["post.eps"], "not an image of a known format"),
        "bomb": (path["bomb.png"], "10000 x 10000 pixels are too many"),
        "bigger bomb": (path["bomb2.png"], "400000000 pixels"),
        "float": (path["float.tiff"], "floating-point"),
        "thin": (path["thin.png"], "6000 x 28 pixels"),
    }  # fmt: skip


BAD_URLS = {  # name -> what is given as an image, and words of the reason
    "http": ("https://example.com/x.png", "only local paths and data: URLs"),
    "ftp": ("FTP://example.com/x.png", "only local paths and data: URLs"),
    "url that is no image": (f"data:image/png;base64,{base64.b64encode(b'nothing').decode()}", "not an image"),
    "url of text": ("data:text/plain;base64,aGk=", "must read data:image/"),
    "url of a video": ("data:video/mp4;base64,aGk=", "must read data:image/"),
    "url without base64": ("data:image/png,abc", "must read data:image/"),
    "url with bad base64": ("data:image/png;base64,aG!k=", "not valid base64"),
    "url with short base64": ("data:image/png;base64,abcde", "not valid base64"),
    "url that is not ascii": ("data:image/png;base64,ä", "not valid base64"),
    "url of nothing": ("data:image/png;base64,", "not an image"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named_with_a_reason(processor, tmp_path):
    for name, (value, words) in (bad_files(tmp_path) | BAD_URLS).items():
        reported = reason(processor, images=[value])
        assert words in reported, (name, reported)
        assert len(reported) < 600, name


def test_a_picture_too_small_for_a_patch_is_scaled_or_refused_in_words(processor, tmp_path):
    tiny = picture(tmp_path / "tiny.png", (1, 1))
    if Version("4.52") <= TRANSFORMERS:
        assert ask(processor, images=[tiny]).tensors["image_grid_thw"].tolist() == [[1, 2, 2]]
    else:
        assert "1 x 1 pixels" in reason(processor, images=[tiny])


@pytest.mark.parametrize(
    ("limits", "section"),
    [({"min_pixels": 50000}, {}), ({"max_pixels": 3136}, {}), ({"min_pixels": 9000}, {"max_pixels": 8000})],
)
def test_limits_that_contradict_each_other_across_sources(files, limits, section):
    reported = reason(RequestProcessor(CHECKPOINT, Processor(**section), 2000), images=[files["a"]], **limits)
    assert "min_pixels = " in reported and "is above max_pixels = " in reported


def test_limits_that_leave_nothing(processor, tmp_path):
    thin = picture(tmp_path / "thin.png", (2800, 28))
    try:
        grid = ask(processor, images=[thin], min_pixels=1, max_pixels=784).tensors["image_grid_thw"]
        assert int(grid.prod()) > 0
    except RequestError as error:  # releases before 4.57
        assert "raise max_pixels" in error.reason


@pytest.mark.skipif("avif" not in features.modules or not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(processor, tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", SIZE, (200, 30, 30)).save(path, quality=100)
    assert np.abs(np.asarray(load_image(str(path))).astype(int) - (200, 30, 30)).max() < 6
    assert ask(processor, images=[str(path)]).tensors["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert ask(processor, images=[data_url(str(path), "image/avif")]).prompt_tokens
    path.write_bytes(path.read_bytes()[:-1])
    assert "cannot be decoded" in reason(processor, images=[str(path)])
