"""Malformed YAML files, values, overrides and request files: the message names the file or key, and says what is wrong.

Values of a wrong kind are generated: every key of the schema is given every kind of value that it does not take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from checkpoints import Shape, make_checkpoint

from adapter.config.schema import Config, Generation, Section

KINDS = {"null": "null", "boolean": "true", "integer": "3", "number": "3.5", "string": "some words",
         "list": "[1, 2]", "mapping": "{a: 1}", "date": "2024-01-01"}
REQUEST = {"prompt": "a"}
CHAT = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
PIXELS = {"integer", "null"}
ACCEPTS: dict[str, set[str]] = {  # key -> the kinds of KINDS that it takes; a string no name or path of which exists
    "model": set(), "model.path": set(), "model.revision": {"null"}, "model.dtype": set(), "model.adapters": set(),
    "model.attn_implementation": set(),
    "tensor_parallel": set(), "tensor_parallel.tp_size": {"integer"}, "tensor_parallel.vision": set(),
    "tensor_parallel.experts": set(),
    "tensor_parallel.desync_check": {"integer"}, "tensor_parallel.heartbeat_s": {"integer"},
    "tensor_parallel.self_test": {"boolean"},
    "deepspeed": {"mapping"}, "weights": set(), "weights.format": set(), "weights.original": {"null"},
    "weights.original_revision": {"string", "null"},
    "batch_size": {"integer"},
    "output": {"string", "null"},
    "processor": set(), "processor.min_pixels": PIXELS, "processor.max_pixels": PIXELS,
    "processor.fps": {"integer", "number"}, "processor.max_frames": {"integer"},
    "generation": set(),
    "requests": set(), "requests.0.id": {"string"}, "requests.0.prompt": {"string", "null"},
    "requests.0.images": set(), "requests.0.videos": set(), "requests.0.system": {"string", "null"},
    "requests.0.expected": {"string", "null"}, "requests.0.min_pixels": PIXELS, "requests.0.max_pixels": PIXELS,
    "requests.0.messages": set(), "requests.0.messages.0.role": set(), "requests.0.messages.0.content": {"string"},
    "requests.0.messages.0.content.0.type": set(), "requests.0.messages.0.content.0.text": {"string", "null"},
    "requests.0.messages.0.content.0.image": {"string", "null"},
    "requests.0.messages.0.content.0.video": {"string", "null"},
    "requests.0.messages.0.content.0.image_url": {"null"},
    "requests.0.messages.0.content.0.image_url.url": {"string"},
    "requests.0.messages.0.content.0.image_url.detail": {"string"},
}
SECTIONS = ["", "model", "tensor_parallel", "weights", "processor", "generation", "requests.0",
            "requests.0.messages.0", "requests.0.messages.0.content.0", "requests.0.messages.0.content.0.image_url"]
HUGE = "9" * 400
BAD_NUMBERS = {
    "tensor_parallel.tp_size": ["0", "-1", HUGE, ".nan", ".inf", "0x0", "1_0.5"],
    "tensor_parallel.desync_check": ["-1", ".inf", "10001"], "tensor_parallel.heartbeat_s": ["-1", "0.5"],
    "batch_size": ["0", "-8", "-" + HUGE, ".inf"],
    "processor.fps": ["0", "-2.0", ".nan", ".inf", "-.inf", "1e999", HUGE],
    "processor.max_frames": ["0", "1", "-768", ".nan"],
    "processor.min_pixels": ["0", "-1", HUGE, ".inf"],
    "processor.max_pixels": ["0", "-1", HUGE, ".nan"],
    "requests.0.min_pixels": ["0", HUGE],
    "requests.0.max_pixels": ["-1", HUGE],
    "generation.max_new_tokens": ["0", "-1", ".inf"],
    "generation.temperature": ["0", "-1.0", ".nan", ".inf", HUGE],
    "generation.top_k": ["-1", ".nan"],
    "generation.top_p": ["0", "1.5", "-0.1", ".nan"],
    "generation.repetition_penalty": ["0", "-1.0", ".inf"],
    "generation.num_beams": ["0", "-4", "1000000000"],
    "generation.eos_token_id": ["-1", "[1, -7]", "[]"],
    "generation.pad_token_id": ["-1"],
    "generation.min_new_tokens": ["-1", ".nan"],
    "generation.no_repeat_ngram_size": ["-1"],
    "generation.length_penalty": [".nan"],
}


def file_of(key: str, value: str) -> str:
    """A config that is right but for `value`, YAML as it stands, at `key`."""
    steps = key.split(".")
    request = {"messages": json.loads(json.dumps(CHAT))} if "messages" in steps else dict(REQUEST)
    tree: dict[str, Any] = {"model": {"path": "model"}, "tensor_parallel": {"tp_size": 2}, "requests": [request]}
    if "image_url" in steps:
        request["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": "a.png"}}
    elif steps[-1] in ("image", "video") and "content" in steps:
        request["messages"][0]["content"][0] = {"type": steps[-1]}
    at: Any = tree
    for step in steps[:-1]:
        at = at[int(step)] if step.isdigit() else at.setdefault(step, {})
    at[steps[-1]] = "@here@"
    return json.dumps(tree).replace('"@here@"', value)


def keys_of(kind: type[Section], prefix: str = "") -> Iterator[str]:
    def sections(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for inner in get_args(annotation):
            yield from sections(inner)

    for name, field in kind.model_fields.items():
        yield prefix + name
        listed = "tuple" in str(field.annotation)
        for inner in sections(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}." + ("0." if listed else ""))


WRONG_KINDS = [(key, kind) for key, accepted in ACCEPTS.items() for kind in KINDS if kind not in accepted]
OUT_OF_RANGE = [(key, value) for key, values in BAD_NUMBERS.items() for value in values]


def test_every_key_of_the_schema_is_tried():
    assert set(keys_of(Config)) == set(ACCEPTS)
    numbers = {f"generation.{key}" for key in Generation.model_fields}
    assert len(numbers & BAD_NUMBERS.keys()) >= 8


@pytest.mark.parametrize(("key", "kind"), WRONG_KINDS)
def test_a_value_of_a_wrong_kind(refused, home, key, kind):
    words = [str(home / "c.yaml"), key] if key != "requests" or kind != "string" else [str(home / "some words")]
    file = config(home, file_of(key, KINDS[kind]))
    refused("plan", "--config", file, words=words, full=key == "generation")  # Transformers checks it


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range(refused, home, key, value):
    file = config(home, file_of(key, value))
    refused("plan", "--config", file, words=["c.yaml", key], full=key.startswith("generation"))


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_of_any_section(refused, home, section):
    key = f"{section}.surprise".lstrip(".")
    refused("generate", "--config", config(home, file_of(key, "1")), words=[f"{key} = 1: unknown"],
            full=section == "generation")


def aliases(template: str, width: int, depth: int) -> str:
    """Every level repeats the one before it `width` times: width ** depth values of a few hundred characters."""
    lines = ["a0: &a0 {k: v}" if "<<" in template else "a0: &a0 [x, x]"]
    for level in range(1, depth + 1):
        lines.append(f"a{level}: &a{level} " + template % ", ".join([f"*a{level - 1}"] * width))
    return "\n".join(lines) + "\n"


LAUGHS = aliases("[%s]", 9, 9)
MERGES = aliases("{<<: [%s]}", 9, 9)
OK = "model: {path: model}\n"
TOUCH = "!!python/object/apply:os.system ['touch executed']"
FILES: dict[str, tuple[bytes | str, list[str]]] = {  # the whole file -> words of the message
    "nothing": ("", ["is empty"]),
    "blanks": ("  \n\n", ["is empty"]),
    "null": ("null", ["is empty"]),
    "a number": ("42", ["an integer", "a mapping"]),
    "a list of models": ("- model: {path: model}", ["a list", "a mapping"]),
    "an open list": (OK + "requests: [", ["line"]),
    "an open mapping": ("model: {path: model", ["line"]),
    "an open quote": (OK + "weights: {format: 'dense}", ["line"]),
    "an open block": (OK + "weights:\n  format: |\n bad", ["line"]),
    "indented wrongly": ("model:\n    path: model\n  dtype: float32", ["line"]),
    "tabs": ("model:\n\tpath: model", ["line 2"]),
    "no space after the colon": ("model:{path: model}", ["model: missing", "model:{path"]),
    "two documents": (OK + "---\n" + OK, ["line 2"]),
    "a directive": ("%YAML 9.9\n---\n" + OK, ["line"]),
    "an unknown tag": (OK + "batch_size: !eight 8", ["line 2", "!eight"]),
    "python that runs": (OK + f"batch_size: {TOUCH}", ["line 2", "python/object/apply:os.system"]),
    "python by name": (OK + "batch_size: !!python/name:os.system", ["line 2", "python/name"]),
    "python by module": (OK + "batch_size: !!python/module:antigravity", ["line 2", "python/module"]),
    "python new": (OK + "batch_size: !!python/object/new:os.system [touch executed]", ["line 2", "python/object"]),
    "a key given twice": (OK + OK, ["line 2", "'model'", "twice"]),
    "a nested key given twice": ("model: {path: model, path: model}", ["'path'", "twice"]),
    "a key twice by other quotes": (OK + "'model': {path: model}", ["line 2", "'model'", "twice"]),
    "a list as a key": (OK + "[a, b]: 1", ["line 2"]),
    "a mapping as a key": (OK + "{a: b}: 1", ["line 2"]),
    "a number as a key": (OK + "8: 1", ["8"]),
    "null as a key": (OK + "null: 1", ["c.yaml"]),
    "a date as a key": (OK + "2024-01-01: 1", ["2024"]),
    "an alias to nowhere": (OK + "deepspeed: *gone", ["line 2", "gone"]),
    "an anchor given twice": (OK + "deepspeed: {a: &x 1, b: *y}", ["line 2", "'y'"]),
    "a merge of a number": (OK + "deepspeed: {<<: 5}", ["line 2"]),
    "laughs, ignored": (OK + LAUGHS, ["c.yaml", "aliases"]),
    "laughs in deepspeed": (OK + LAUGHS + "deepspeed: {x: *a9}", ["c.yaml", "aliases"]),
    "laughs in generation": (OK + LAUGHS + "generation: {top_k: *a9}", ["c.yaml", "aliases"]),
    "laughs in an unknown name": (OK + LAUGHS + "generation: {topk: *a9}", ["c.yaml", "aliases"]),
    "laughs in requests": (OK + LAUGHS + "requests: *a9", ["c.yaml", "aliases"]),
    "laughs that merge": (OK + MERGES, ["c.yaml", "aliases"]),
    "a list within itself": (OK + "requests: &a [*a]", ["c.yaml", "itself"]),
    "a mapping within itself": (OK + "deepspeed: &a {x: *a}", ["c.yaml", "itself"]),
    "a merge of itself": (OK + "deepspeed: &a {<<: *a}", ["c.yaml", "itself"]),
    "two lists within each other": (OK + "requests: &a [&b [*a, *b]]", ["c.yaml", "itself"]),
    "nested 5,000 deep": (OK + "requests: " + "[" * 5000 + "]" * 5000, ["c.yaml", "not valid YAML"]),
    "mappings nested deep": (OK + "deepspeed: " + "{a: " * 3000 + "1" + "}" * 3000, ["c.yaml", "not valid YAML"]),
    "blocks nested deep": ("".join(" " * n + "a:\n" for n in range(900)), ["c.yaml"]),
    "a number too long for Python": (OK + "batch_size: " + "9" * 5000, ["c.yaml", "not valid YAML"]),
    "a date that never was": (OK + "batch_size: 2024-13-45", ["c.yaml", "not valid YAML"]),
    "sexagesimal": (OK + "batch_size: 1:99:99", ["c.yaml"]),
    "bad base64": (OK + "batch_size: !!binary 'a'", ["c.yaml", "line 2"]),
    "binary": (OK + "batch_size: !!binary aGFsbG8=", ["batch_size", "bytes"]),
    "a set": (OK + "batch_size: !!set {a, b}", ["batch_size"]),
    "an octal that is none": (OK + "batch_size: 0o9", ["batch_size"]),
    "NUL": (OK + "batch_size: \0", ["c.yaml"]),
    "a control character": (OK + "batch_size: \x1b[31m", ["c.yaml"]),
    "invalid UTF-8": (OK.encode() + b"# \xff\xfe", ["c.yaml", "cannot be read"]),
    "Latin-1": (OK.encode() + "# Größe".encode("latin-1"), ["c.yaml", "cannot be read"]),
    "UTF-16 with a mark": (OK.encode("utf-16"), ["c.yaml", "cannot be read"]),
    "UTF-16 without": (OK.encode("utf-16-le"), ["c.yaml"]),
    "UTF-32": (OK.encode("utf-32"), ["c.yaml"]),
    "an overlong sequence": (OK.encode() + b"# \xc0\xaf", ["c.yaml", "cannot be read"]),
    "half a surrogate": (OK.encode() + b"# \xed\xa0\x80", ["c.yaml", "cannot be read"]),
    "a byte order mark in the middle": (OK.encode() + b"\xef\xbb\xbfbatch_size: 2", ["c.yaml", "batch_size"]),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["c.yaml", "cannot be read"]),
    "a gzip file": (b"\x1f\x8b\x08\0\0\0\0\0", ["c.yaml"]),
    "an ELF file": (b"\x7fELF\x02\x01\x01" + bytes(60), ["c.yaml"]),
    "a zip file": (b"PK\x03\x04" + bytes(60), ["c.yaml"]),
    "safetensors": ((9).to_bytes(8, "little") + b'{"a": {}}', ["c.yaml"]),
    "HTML": ("<!DOCTYPE html>\n<html><body>404: Not Found</body></html>", ["c.yaml"]),
    "TOML": ("[model]\npath = 'model'", ["c.yaml"]),
    "INI": ("model.path=model", ["a string", "a mapping"]),
    "JSON cut off": ('{"model": {"path": "mod', ["c.yaml", "line 1"]),
    "a shell script": ("#!/bin/sh\nrm -rf model", ["a string", "a mapping"]),
    "14 MB": (OK + "#" * (14 << 20), ["c.yaml", "bytes"]),
    "a path into nothing": ("model: {path: 'model/../gone'}", ["model.path", "gone"]),
    "a path with NUL": ('model: {path: "a\\0b"}', ["model.path"]),
    "a path of 10,000 letters": (f"model: {{path: {'p' * 10000}}}", ["model.path"]),
    "a path to a device": ("model: {path: /dev/null}", ["model.path", "not a directory"]),
    "a path of blanks": ("model: {path: '  '}", ["model.path"]),
    "a URL for a path": ("model: {path: 'https://huggingface.co/Qwen/Qwen2-VL-7B-Instruct'}", ["model.path"]),
    "no requests file": (OK + "requests: gone.jsonl", ["requests", "gone.jsonl", "No such file"]),
    "requests from a directory": (OK + "requests: model", ["requests", "model"]),
    "requests from a device": (OK + "requests: /dev/zero", ["requests", "/dev/zero", "not a regular file"]),
    "requests from a path with NUL": (OK + 'requests: "a\\0b"', ["requests"]),
    "requests of weights": (OK + "requests: model/model.safetensors", ["requests", "model.safetensors"]),
    "ids of all kinds": (OK + "requests: [{id: [a], prompt: a}, {id: {b: c}, prompt: a}]", ["requests.0.id"]),
    "generation that cannot be": (OK + "generation: {num_beams: 2, num_beam_groups: 3}", ["generation"]),
    "words for numbers": (OK + "generation: {min_new_tokens: few}", ["generation.min_new_tokens", "'few'"]),
    "words for token ids": (OK + "generation: {suppress_tokens: [stop]}", ["generation.suppress_tokens", "'stop'"]),
    "bad words that are words": (OK + "generation: {bad_words_ids: [damn]}", ["generation.bad_words_ids", "'damn'"]),
    "a penalty in words": (OK + "generation: {length_penalty: long}", ["generation.length_penalty", "'long'"]),
    "a watermark": (OK + "generation: {watermarking_config: 5}", ["generation", "watermarking_config"]),
}
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "no equals": (["tp_size"], ["'tp_size'", "key.sub=value"]),
    "no key": (["=4"], ["'=4'", "key.sub=value"]),
    "an empty step": (["model..path=x"], ["'model..path=x'", "key.sub=value"]),
    "a dot at the end": (["model.=x"], ["'model.=x'", "key.sub=value"]),
    "only dots": (["...=x"], ["'...=x'", "key.sub=value"]),
    "an unknown section": (["modle.path=x"], ["modle", "did you mean 'model'"]),
    "an unknown key": (["tensor_parallel.tpsize=2"], ["tensor_parallel.tpsize", "'tp_size'"]),
    "text for a number": (["tensor_parallel.tp_size=two"], ["tensor_parallel.tp_size = 'two'"]),
    "nothing for a number": (["tensor_parallel.tp_size="], ["tensor_parallel.tp_size = None"]),
    "YAML cut off": (["generation={"], ["'generation={'"]),
    "YAML that runs": ([f"batch_size={TOUCH}"], ["python/object/apply:os.system"]),
    "laughs": (["deepspeed=" + "{a: &a [x, x], " + ", ".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)) + "}"],
        ["deepspeed", "aliases"]),
    "a step into text": (["model.path.x=1"], ["model.path.x=1", "no keys"]),
    "a step into a list": (["requests.0.prompt=b"], ["requests.0.prompt=b", "override it as a whole"]),
    "a model gone": (["model.path=gone"], ["model.path", "gone"]),
    "a model that is a file": (["model.path=/etc/passwd"], ["model.path", "not a directory"]),
    "requests gone": (["requests=gone.jsonl"], ["requests", "gone.jsonl"]),
    "everything null": (["model=null"], ["model = None", "null"]),
    "several": (["tensor_parallel.tp_size=0", "batch_size=x", "nonsense"],
                ["tensor_parallel.tp_size = 0", "batch_size = 'x'", "'nonsense'", "3 problems"]),
    "half a surrogate": (["batch_size=\udcff"], ["batch_size"]),
}
LINES: dict[str, tuple[str | bytes, list[str]]] = {  # a JSON-lines file -> words
    "nothing": ("", ["r.jsonl", "no requests"]),
    "empty lines": ("\n\n \n", ["r.jsonl", "no requests"]),
    "a list": ("[1, 2]", ["r.jsonl:1", "a list"]),
    "a number": ('{"prompt": "a"}\n7', ["r.jsonl:2", "an integer"]),
    "null": ("null", ["r.jsonl:1", "null"]),
    "cut off": ('{"prompt": "a"}\n{"prompt": "b', ["r.jsonl:2", "not a JSON object"]),
    "two on a line": ('{"prompt": "a"}{"prompt": "b"}', ["r.jsonl:1", "Extra data"]),
    "one over two lines": ('{"prompt":\n"a"}', ["r.jsonl:1", "r.jsonl:2"]),
    "YAML": ("prompt: a", ["r.jsonl:1", "not a JSON object"]),
    "Python": ("{'prompt': 'a'}", ["r.jsonl:1", "not a JSON object"]),
    "a trailing comma": ('{"prompt": "a",}', ["r.jsonl:1", "not a JSON object"]),
    "a JSON list over lines": ('[\n{"prompt": "a"},\n{"prompt": "b"}\n]', ["r.jsonl:1", "r.jsonl:2", "r.jsonl:4"]),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', ["r.jsonl:1", "'prompt' appears twice"]),
    "an unknown key": ('{"promt": "a"}', ["r.jsonl:1", "did you mean 'prompt'"]),
    "both forms": ('{"prompt": "a", "messages": []}', ["r.jsonl:1", "messages"]),
    "neither form": ('{"id": "x"}', ["r.jsonl:1", "exactly one"]),
    "the same id": ('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', ["r.jsonl:1", "r.jsonl:2", "'x'"]),
    "NaN": ('{"prompt": "a", "max_pixels": NaN}', ["r.jsonl:1 max_pixels = nan"]),
    "a fraction": ('{"prompt": "a", "max_pixels": 1e400}', ["r.jsonl:1 max_pixels = inf"]),
    "a number too long": ('{"prompt": "a", "max_pixels": ' + "9" * 5000 + "}", ["r.jsonl:1", "not a JSON object"]),
    "nested deep": ("[" * 100_000, ["r.jsonl:1", "not a JSON object"]),
    "objects nested deep": ('{"a":' * 50_000, ["r.jsonl:1", "not a JSON object"]),
    "a control character": ('{"prompt": "a\x07"}', ["r.jsonl:1", "control character"]),
    "Latin-1": ('{"prompt": "Größe"}'.encode("latin-1"), ["r.jsonl", "cannot be read"]),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), ["r.jsonl", "cannot be read"]),
    "a picture": (b"\x89PNG\r\n\x1a\n", ["r.jsonl", "cannot be read"]),
}
READING = ["a directory", "missing", "a loop of links", "a dangling link", "a fifo", "a device", "a name too long",
           "not ours to read"]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model", Shape(heads=12, kv_heads=4, layers=1), files=1)


@pytest.fixture
def home(tmp_path, small_model) -> Path:
    (tmp_path / "model").symlink_to(small_model)
    return tmp_path


def config(home: Path, content: bytes | str) -> Path:
    (home / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return home / "c.yaml"


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config(refused, home, case):
    content, words = FILES[case]
    refused("plan", "--config", config(home, content), words=words, full="generation" in words[0])
    assert not (home / "executed").exists()


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override(refused, home, case):
    overrides, words = OVERRIDES[case]
    refused("plan", "--config", config(home, OK + "requests: [{prompt: a}]"), *overrides, words=words)
    assert not (home / "executed").exists()


@pytest.mark.parametrize("case", LINES)
def test_a_requests_file(refused, home, case):
    content, words = LINES[case]
    (home / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("generate", "--config", config(home, OK + "requests: r.jsonl"), words=words)


@pytest.mark.parametrize("what", READING)
def test_a_config_that_cannot_be_read(refused, home, what):
    file = home / "c.yaml"
    if what == "a directory":
        file.mkdir()
    elif what == "a loop of links":
        file.symlink_to(file)
    elif what == "a dangling link":
        file.symlink_to(home / "gone")
    elif what == "a fifo":
        os.mkfifo(file)
    elif what == "a device":
        file.symlink_to("/dev/zero")
    elif what == "a name too long":
        file = home / ("c" * 300)
    elif what == "not ours to read":
        config(home, OK).chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("root reads everything")
    refused("plan", "--config", file, words=[file.name, "cannot be read"])


def test_there_are_enough_of_them():
    assert len(WRONG_KINDS) + len(OUT_OF_RANGE) + len(SECTIONS) + len(FILES) + len(OVERRIDES) + len(LINES) >= 400
