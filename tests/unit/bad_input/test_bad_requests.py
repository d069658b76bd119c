"""Malformed pictures, videos, prompts and chats fail as requests, with their id and a reason; and a checkpoint whose
tokenizer, processor or chat template is broken is refused before any rank joins another."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parents[3] / "launch" / "demo" / "checkpoint"
SPECIAL = sorted({t["content"] for t in json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
                  if t["special"]})


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")}


def video(frames: int = 12, container: str = "mp4") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", container) as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for level in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((56, 84, 3), 20 * level, np.uint8), "rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def decodes(data: bytes) -> bool:
    """Whether Pillow makes a picture of it, without any care of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        return True
    except Exception:
        return False


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(8):
        changed[rng.randrange(len(data) // 2)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeros(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) // 2)
    return data[:at] + bytes(200) + data[at + 200 :]


MUTATED = [(kind, how, seed) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF") for how in (cut, flip, zeros)
           for seed in range(4)]


def mutated(kind: str, how: Callable[[bytes, random.Random], bytes], seed: int) -> bytes:
    """Decoders forgive much: drawn until the picture really cannot be decoded."""
    rng = random.Random(seed)
    while decodes(data := how(PICTURES[kind], rng)):
        pass
    return data


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(PICTURES["JPEG"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(PICTURES["BMP"])
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


TEXT = "not an image of a known format"
WRITTEN: dict[str, tuple[bytes, str]] = {  # a picture -> a word of the reason
    "nothing": (b"", "empty"),
    "one byte": (b"\x89", TEXT),
    "a signature only": (b"\x89PNG\r\n\x1a\n", TEXT),
    "text": (b"a red square", TEXT),
    "HTML": (b"<!DOCTYPE html><html>404</html>", TEXT),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', TEXT),
    "PDF": (b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n", TEXT),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", TEXT),
    "a video": (video(2), TEXT),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", TEXT),
    "a terabyte of pixels, PNG": (png(1_000_000, 1_000_000), "pixels"),
    "the most pixels, PNG": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "a long line, PNG": (png(2**31 - 1, 1), "pixels"),
    "a bomb, PNG": (png(30_000, 30_000, data=bytes(1 << 20)), "pixels"),
    "just too many pixels": (png(9460, 9460, data=b""), "9460 x 9460 pixels"),
    "a bomb, JPEG": (jpeg(65_500, 65_500), "pixels"),
    "a bomb, BMP": (bmp(100_000, 100_000), "pixels"),
    "a bomb, GIF": (b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + PICTURES["GIF"][13:], ""),
    "a bomb, PPM": (b"P6 1000000 1000000 255\n", "pixels"),
    "a bomb of text, PNG": (png(4, 4, data=bytes(52), extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))),
                            "cannot be decoded"),
    "no width, PNG": (png(0, 9), ""),
    "no height, PNG": (png(9, 0), ""),
    "no size, JPEG": (jpeg(0, 0), ""),
    "no size, BMP": (bmp(0, 0), ""),
    "no size, PPM": (b"P6 0 0 255\n", ""),
    "negative, PPM": (b"P6 -4 -4 255\n" + bytes(48), ""),
    "letters for a size, PPM": (b"P6 four four 255\n" + bytes(48), ""),
    "no pixels, PNG": (png(64, 64), "cannot be decoded"),
    "a colour type that is none, PNG": (png(4, 4, colour=5, data=bytes(52)), ""),
    "17 bits, PNG": (png(4, 4, depth=17, data=bytes(52)), ""),
    "too few pixels, PPM": (b"P6 64 64 255\n" + bytes(10), "cannot be decoded"),
    "a thin one": (png(20_000, 28, data=(b"\0" + bytes(60_000)) * 28), "20000 x 28"),
}
B64 = base64.b64encode(PICTURES["PNG"]).decode()
NAMED: dict[str, tuple[str, str]] = {  # what is stated as a picture -> a word of the reason
    "http": ("http://127.0.0.1:9/x.png", "download it first"),
    "https": ("https://example.com/x.png", "download it first"),
    "HTTPS": ("HTTPS://EXAMPLE.COM/X.PNG", "download it first"),
    "ftp": ("ftp://example.com/x.png", "download it first"),
    "s3": ("s3://bucket/x.png", "download it first"),
    "an unknown scheme": ("gopher+x://example.com", "download it first"),
    "file, gone": ("file:///gone.png", "no such file"),
    "file, a host": ("file://host/gone.png", "no such file"),
    "file, a directory": ("file:///tmp", "not a regular file"),
    "missing": ("gone.png", "no such file"),
    "a directory": (".", "not a regular file"),
    "the root": ("/", "not a regular file"),
    "a device": ("/dev/zero", "not a regular file"),
    "a terminal": ("/dev/tty", "not a regular file"),
    "memory": ("/proc/self/mem", "empty"),
    "a name too long": ("x" * 300 + ".png", "no such file"),
    "a path too long": ("x/" * 5000, "characters"),
    "NUL": ("a\0b.png", "b.png"),
    "a star": ("*.png", "*.png"),
    "a shell": ("$(touch executed)", "no such file"),
    "a pipe": ("touch executed |", "no such file"),
    "data, no kind": ("data:;base64," + B64, "must read data:image/"),
    "data, text": ("data:text/plain;base64," + B64, "must read data:image/"),
    "data, a video": ("data:video/mp4;base64," + B64, "must read data:image/"),
    "data, no base64": ("data:image/png," + B64, "must read data:image/"),
    "data, only the word": ("data:", "must read data:image/"),
    "data, letters outside": ("data:image/png;base64," + B64[:40] + "!" + B64[41:], "not valid base64"),
    "data, cut": ("data:image/png;base64," + B64[:41], "not valid base64"),
    "data, padding inside": ("data:image/png;base64," + B64[:40] + "==" + B64[42:], "not valid base64"),
    "data, half the picture": ("data:image/png;base64," + B64[: len(B64) // 8 * 4], "cannot be decoded"),
    "data, twice": ("data:image/png;base64,data:image/png;base64," + B64, "not valid base64"),
    "data, nothing": ("data:image/png;base64,", TEXT),
    "data, URL-safe letters": ("data:image/png;base64,-_-_" + B64[4:], "not valid base64"),
}
VIDEO = video()
VIDEOS: dict[str, tuple[bytes | None, str]] = {
    **{f"cut at {percent} %": (VIDEO[: len(VIDEO) * percent // 100], "")
       for percent in (1, 5, 20, 40, 60, 80, 95)},
    "nothing": (b"", "empty"),
    "text": (b"a video", "cannot be decoded"),
    "HTML": (b"<html></html>", "cannot be decoded"),
    "zeros": (bytes(5000), "cannot be decoded"),
    "a concat list": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "cannot be decoded"),
    "an HLS playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", ""),
    "a DASH manifest": (b'<?xml version="1.0"?><MPD><Period/></MPD>', "cannot be decoded"),
    "an SDP file": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\n", ""),
    "a zip file": (b"PK\x03\x04" + bytes(100), "cannot be decoded"),
    "no track": (VIDEO.replace(b"trak", b"free"), "not one frame"),
    "no samples": (VIDEO.replace(b"stsz", b"free"), ""),
    "no chunks": (VIDEO.replace(b"stco", b"free"), ""),
    "a length that lies": (b"\xff\xff\xff\xff" + VIDEO[4:], "cannot be decoded"),
    "only a head": (VIDEO[:32], "cannot be decoded"),
    "no frame": (video(0, "avi"), ""),
}
PICTURE = "data:image/png;base64," + B64
CHATS: dict[str, tuple[dict[str, Any], list[str]]] = {  # a request -> words of its reason
    "an empty prompt": ({"prompt": ""}, ["the prompt is empty"]),
    "blanks": ({"prompt": " \t\n"}, ["the prompt is empty"]),
    "blanks of Unicode": ({"prompt": "\u3000\u2003\u00a0"}, ["the prompt is empty"]),
    "a picture without words": ({"prompt": "", "images": [PICTURE]}, ["the prompt is empty"]),
    "words of the system only": ({"prompt": "", "system": "Be brief."}, ["the prompt is empty"]),
    "no turn of a user": ({"messages": [{"role": "system", "content": "a"}]}, ["the prompt is empty"]),
    "only the assistant": ({"messages": [{"role": "assistant", "content": "a"}]}, ["the prompt is empty"]),
    "an empty turn": ({"messages": [{"role": "user", "content": ""}]}, ["the prompt is empty"]),
    "too long": ({"prompt": "word " * 4000}, ["at most 2000 fit"]),
    "one long word": ({"prompt": "a" * 100_000}, ["at most 2000 fit"]),
    "a system text too long": ({"prompt": "a", "system": "word " * 4000}, ["at most 2000 fit"]),
    "too many pictures": ({"prompt": "a", "images": [PICTURE] * 200, "min_pixels": 50176}, ["at most 2000 fit"]),
    "too many frames": ({"prompt": "a", "videos": [[PICTURE] * 400], "min_pixels": 50176}, ["at most 2000 fit"]),
    "far too many pixels wanted": ({"prompt": "a", "images": [PICTURE], "min_pixels": 10**9, "max_pixels": 2 * 10**9},
                                   ["at most 2000 fit"]),
    "the least above the most": ({"prompt": "a", "images": [PICTURE], "min_pixels": 1 << 24}, ["min_pixels", "above"]),
    "half a surrogate": ({"prompt": "half \ud800"}, ["request 'r'"]),
    "a token in two halves": ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}]}, ["'<|im_end|>'"]),
    "frames of two sizes": ({"prompt": "a", "videos": [[PICTURE, "data:image/png;base64," + base64.b64encode(
        png(4, 4, data=bytes(52))).decode()]]}, ["not of the same size"]),
    "a frame gone": ({"prompt": "a", "videos": [[PICTURE, "gone.png"]]}, ["gone.png", "no such file"]),
    "a picture as a video": ({"prompt": "a", "videos": [PICTURE]}, ["must read data:video/"]),
    "a bad picture in a chat": ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://example.com/x"}}, {"type": "text", "text": "a"}]}]},
        ["download it first"]),
}


@pytest.fixture
def fails(refused, tmp_path):
    """fails(request, words): the request must fail, with its id and these words."""
    def check(request: dict[str, Any], words: list[str]) -> None:
        (tmp_path / "r.jsonl").write_text(json.dumps({"id": "r", **request}))
        (tmp_path / "c.yaml").write_text(f"model: {{path: {DEMO}}}\nrequests: r.jsonl\n")
        message = refused("prepare", "--config", tmp_path / "c.yaml", words=words)
        assert message.startswith("error: request 'r': ") and len(message) < 1500, message[:2000]
        assert not (tmp_path / "executed").exists()

    return check


@pytest.mark.parametrize(("kind", "how", "seed"), MUTATED, ids=lambda value: getattr(value, "__name__", None))
def test_a_mutated_picture(fails, tmp_path, kind, how, seed):
    (tmp_path / "p.png").write_bytes(mutated(kind, how, seed))
    fails({"prompt": "a", "images": ["p.png"]}, ["p.png"])


@pytest.mark.parametrize("case", WRITTEN)
def test_a_picture_that_is_none(fails, tmp_path, case):
    data, word = WRITTEN[case]
    (tmp_path / "p.png").write_bytes(data)
    fails({"prompt": "a", "images": ["p.png"]}, [word] if "20000 x" in word else ["p.png", word])


@pytest.mark.parametrize("case", NAMED)
def test_a_name_of_no_picture(fails, case):
    value, word = NAMED[case]
    fails({"prompt": "a", "images": [value]}, [word])


@pytest.mark.parametrize("what", ["a fifo", "a loop of links", "a dangling link"])
def test_a_file_that_cannot_be_opened(fails, tmp_path, what):
    if what == "a fifo":
        os.mkfifo(tmp_path / "p.png")
    else:
        (tmp_path / "p.png").symlink_to("p.png" if what == "a loop of links" else "gone")
    fails({"prompt": "a", "images": ["p.png"]}, ["p.png"])
    fails({"prompt": "a", "videos": ["p.png"]}, ["p.png"])


@pytest.mark.parametrize("case", VIDEOS)
def test_a_video_that_is_none(fails, tmp_path, case):
    data, word = VIDEOS[case]
    (tmp_path / "f.mp4").write_bytes(data)
    fails({"prompt": "a", "videos": ["f.mp4"]}, ["f.mp4", word])


@pytest.mark.parametrize("case", CHATS)
def test_a_request_that_cannot_be_served(fails, case):
    fails(*CHATS[case])


@pytest.mark.parametrize("token", SPECIAL)
def test_a_special_token_in_the_text(fails, token):
    fails({"prompt": f"what is {token}?"}, [repr(token), "a meaning of its own"])


# The checkpoint's own side files

SIDE = ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"]
CONTENT: dict[str, bytes] = {
    "nothing": b"", "cut off": b'{"a": [1, ', "text": b"hello", "a list": b"[1]", "null": b"null", "a number": b"7",
    "UTF-16": "{}".encode("utf-16"), "a nest": b'{"a":' * 60_000, "a git-lfs pointer": b"version https://git-lfs",
}
FIELDS: dict[str, tuple[str, str, Any]] = {
    "a template that does not parse": ("chat_template.json", "chat_template", "{% if %}"),
    "a template that raises": ("chat_template.json", "chat_template", "{{ raise_exception('no') }}"),
    "a template of a name that is not": ("chat_template.json", "chat_template", "{{ gone.of.nothing }}"),
    "a template that breaks out": ("chat_template.json", "chat_template", "{{ ''.__class__.__mro__[1] }}"),
    "a template of nothing": ("chat_template.json", "chat_template", ""),
    "a template that is a number": ("chat_template.json", "chat_template", 5),
    "another picture token": ("config.json", "image_token_id", 9),
    "another video token": ("config.json", "video_token_id", 9),
}


def side_files(home: Path) -> Path:
    (home / "model").mkdir()
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, home / "model")
    (home / "c.yaml").write_text("{model: {path: model}}")
    return home / "model"


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("file", SIDE)
def test_a_side_file(refused, tmp_path, file, content):
    model = side_files(tmp_path)
    for template in model.glob("chat_template*") if file == "chat_template.json" else ():
        template.unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / file).write_bytes(CONTENT[content])
    for other in ("vocab.json", "merges.txt") if file == "tokenizer.json" else ():
        (model / other).unlink(missing_ok=True)
    refused("processor", "--config", tmp_path / "c.yaml", words=["model", "processor, tokenizer or chat template"])


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_of_a_side_file(refused, tmp_path, case):
    file, key, value = FIELDS[case]
    model = side_files(tmp_path)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    stated = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(stated | {key: value}))
    refused("processor", "--config", tmp_path / "c.yaml", words=["model", "processor, tokenizer or chat template"])


def test_there_are_enough_of_them():
    assert len(MUTATED) + len(WRITTEN) + len(NAMED) + len(VIDEOS) + len(CHATS) + len(SPECIAL) >= 150
