"""A resumed job takes a row of the file only if everything that its answer depends on is the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from output_files import DEMO, NAMES, complete, refused, rows
from PIL import Image


@pytest.mark.parametrize("changed", [
    {"requests": [{"id": n, "prompt": "What else?"} for n in NAMES]},
    {"requests": [{"id": n, "prompt": f"What is {n}?", "max_pixels": 3136} for n in NAMES]},
    {"requests": [{"id": n, "prompt": f"What is {n}?", "images": ["one.bmp"]} for n in NAMES]},
    {"generation": {"max_new_tokens": 5}},
    {"processor": {"fps": 1.0}},
    {"model": {"path": str(DEMO), "dtype": "float32"}},
])
def test_what_the_answers_depend_on_must_be_the_same(file, whole, changed):
    refused(file, "line 1 answers another request 'first'", **changed)
    file.write_bytes(whole.splitlines()[0])  # an answer, and not one that a crash cut off
    refused(file, "line 1 answers another request 'first'", **changed)


@pytest.mark.parametrize("changed", [
    {"requests": [{"id": n, "prompt": f"What is {n}?", "expected": "blue"} for n in NAMES]},
    {"tensor_parallel": {"tp_size": 2}}, {"batch_size": 1}, {"deepspeed": {"enable_cuda_graph": False}},
])
def test_what_they_do_not_depend_on_may_change(file, whole, changed):
    file.write_bytes(whole[:-3])
    assert complete(file, **changed) == [NAMES[2]]
    assert file.read_bytes() == whole


def test_requests_may_be_in_another_order_and_more(file, whole):
    names = [NAMES[2], "new", NAMES[0], NAMES[1]]
    assert complete(file, names) == ["new"]
    assert [r["id"] for r in rows(file)] == names
    refused(file, "line 2 answers request 'new', which the config does not have")


def test_the_same_settings_stated_in_another_order_are_the_same(file):
    complete(file, generation={"max_new_tokens": 5, "do_sample": True})
    assert complete(file, generation={"do_sample": True, "max_new_tokens": 5}) == []


def test_what_yaml_has_and_json_has_not_in_the_settings(file):
    complete(file, generation={"assistant_early_exit": b"1"})
    assert complete(file, generation={"assistant_early_exit": b"1"}) == []
    refused(file, "answers another request", generation={"assistant_early_exit": b"2"})


@pytest.mark.parametrize("changed", [
    {"weights": {"format": "int4"}},
    {"model": {"path": str(DEMO), "attn_implementation": "eager"}},
    {"model": {"path": str(DEMO), "dtype": "float16"}},
    {"deepspeed": {"max_out_tokens": 64}},
    {"deepspeed": {"max_tokens": 64}},
    {"processor": {"max_frames": 12}},
    {"processor": {"max_pixels": 3136}},
    {"generation": {"do_sample": True}},
])
def test_settings_that_change_a_token(file, whole, changed):
    refused(file, "line 1 answers another request 'first'", **changed)


def test_deepspeeds_two_names_of_one_limit_are_the_same(file):
    complete(file, deepspeed={"max_out_tokens": 64})
    assert complete(file, deepspeed={"max_tokens": 64}) == []


def flip_a_weight(directory: Path) -> None:
    """The last byte of the last tensor: header and size stay as they were."""
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def edit(name: str):
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(path.read_text() + "\n")

    return change


def add(name: str):
    return lambda directory: (directory / name).write_text("{}")


@pytest.fixture
def trained(tmp_path):
    """A copy of the demo checkpoint whose directory is called `checkpoint` too."""
    return Path(shutil.copytree(DEMO, tmp_path / "run2" / "checkpoint"))


@pytest.mark.parametrize("change", [flip_a_weight, *map(edit, [
    "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "vocab.json", "merges.txt",
]), *map(add, ["chat_template.jinja", "processor_config.json", "special_tokens_map.json", "added_tokens.json"])])
def test_another_checkpoint_whose_directory_has_the_same_name(file, whole, trained, change):
    assert complete(file, model={"path": str(trained)}) == [], "a copy elsewhere is the same checkpoint"
    change(trained)
    refused(file, "line 1 answers another request 'first'", model={"path": str(trained)})


def test_files_that_no_answer_depends_on(file, whole, trained):
    (trained / "README.md").write_text("x")
    (trained / "accuracy.json").unlink()
    assert complete(file, model={"path": str(trained)}) == []


@pytest.mark.parametrize("kind", ["images", "videos", "frames", "messages"])
def test_a_media_file_replaced_by_another_of_the_same_name(file, kind):
    media = file.with_name("one.bmp")
    Image.new("RGB", (56, 56), "red").save(media)
    stated = {"images": {"prompt": "x", "images": [str(media)]}, "videos": {"prompt": "x", "videos": [str(media)]},
              "frames": {"prompt": "x", "videos": [[str(media), str(media)]]},
              "messages": {"messages": [{"role": "user", "content": [
                  {"type": "image_url", "image_url": {"url": str(media)}}, {"type": "text", "text": "x"}]}]}}[kind]
    sections = {"names": ("r",), "requests": [{"id": "r", **stated}]}
    complete(file, **sections)
    assert complete(file, **sections) == []
    facts = media.stat()
    Image.new("RGB", (56, 56), "tan").save(media)
    assert media.stat().st_size == facts.st_size, "the size does not tell them apart"
    os.utime(media, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
    refused(file, "line 1 answers another request 'r'", **sections)
    media.unlink()
    refused(file, "line 1 answers another request 'r'", **sections)


@pytest.mark.parametrize("asked", ["0123456789abcdef", "0-0123456789abcdef", "999-0123456789abcdef"])
def test_a_file_of_another_version_is_refused_as_such(file, whole, asked):
    old = [row | {"asked": asked} for row in rows(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    refused(file, "line 1 was written by (an older|a newer) version of this program")
