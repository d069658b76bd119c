"""The YAML schema: what is accepted, what it becomes, and that everything else is one readable UserError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from adapter.config.load import from_dict, load_config, parse_request
from policies.errors import UserError


@pytest.fixture
def home(tmp_path):
    """A directory with a model directory in it, and a writer of configs next to it."""
    (tmp_path / "model").mkdir()
    return tmp_path


def write(home: Path, text: str, name: str = "c.yaml") -> Path:
    (home / name).write_text(text)
    return home / name


def complaint(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def test_defaults(home):
    config = load_config(write(home, "model: {path: model}"))
    assert config.model.path == home / "model"
    assert (config.model.dtype, config.model.torch_dtype) == ("bfloat16", torch.bfloat16)
    assert config.model.attn_implementation == "sdpa"
    assert (config.tensor_parallel.tp_size, config.tensor_parallel.vision) == (4, "tensor")
    assert (config.weights.format, config.batch_size) == ("dense", 8)
    assert (config.deepspeed, config.generation, config.requests) == ({}, {}, ())
    assert config.processor.model_dump() == {"min_pixels": None, "max_pixels": None, "fps": 2.0, "max_frames": 768}


def test_frozen(home):
    config = load_config(write(home, "model: {path: model}"))
    for section, key in ((config, "batch_size"), (config.model, "dtype"), (config.tensor_parallel, "tp_size")):
        with pytest.raises(ValidationError):
            setattr(section, key, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_dtype(home, dtype):
    config = load_config(write(home, f"model: {{path: model, dtype: {dtype}}}"))
    assert config.model.torch_dtype is getattr(torch, dtype)


def test_precedence_is_override_then_file_then_default(home):
    path = write(home, "model: {path: model}\ntensor_parallel: {tp_size: 2}\ndeepspeed: {a: {b: 1}}")
    assert load_config(path).tensor_parallel.tp_size == 2
    config = load_config(
        path, ["tensor_parallel.tp_size=3", "tensor_parallel.tp_size=8", "deepspeed.a.c=x", "processor.fps=1"]
    )
    assert config.tensor_parallel.tp_size == 8
    assert config.deepspeed == {"a": {"b": 1, "c": "x"}}
    assert config.processor.fps == 1.0


def test_an_override_does_not_write_through_a_yaml_anchor(home):
    path = write(home, "model: {path: model}\ndeepspeed: {a: &x {n: 1}, b: *x}")
    assert load_config(path, ["deepspeed.a.n=2"]).deepspeed == {"a": {"n": 2}, "b": {"n": 1}}


def test_relative_paths_belong_to_who_states_them(home, monkeypatch):
    here, lines = home / "here", home / "lines"
    (here / "other").mkdir(parents=True)
    lines.mkdir()
    monkeypatch.chdir(here)
    request = {"prompt": "q", "images": ["a.png", "/abs/b.png", "data:image/png;base64,AA", "https://x/y.png"]}
    write(lines, json.dumps(request) + "\n\n" + json.dumps({**request, "images": ["file:///p%20q.png"]}), "r.jsonl")
    path = write(home, "model: {path: model}\nrequests: [{prompt: q, images: [a.png], videos: [[f.png], v.mp4]}]")

    assert load_config(path).requests[0].images == (str(home / "a.png"),)
    assert load_config(path).requests[0].videos == ((str(home / "f.png"),), str(home / "v.mp4"))
    assert load_config(path, ["model.path=other"]).model.path == here / "other"
    assert load_config(path, ["model={path: other}"]).model.path == here / "other"
    assert load_config(path, ["requests=[{prompt: q, images: [a.png]}]"]).requests[0].images == (str(here / "a.png"),)
    from_lines = load_config(path, ["requests=../lines/r.jsonl"]).requests
    assert from_lines[0].images == (str(lines / "a.png"), *request["images"][1:])
    assert from_lines[1].images == ("/p q.png",)
    assert from_dict({"model": {"path": "model"}}, home).model.path == home / "model"


def test_requests_in_both_forms(home):
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}},
        {"type": "video", "video": "v.mp4"},
        {"type": "text", "text": "what?"},
    ]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    config = from_dict(
        {
            "model": {"path": "model"},
            "requests": [
                {"messages": chat, "expected": "x"},
                {"id": "z", "prompt": "what?", "system": "be brief", "images": ["a.png", "b.png"], "videos": ["v.mp4"]},
                {"prompt": "what?", "min_pixels": 1, "max_pixels": 2},
            ],
        },
        home,
    )
    a, b, v = (str(home / name) for name in ("a.png", "b.png", "v.mp4"))
    expected = [("image", a), ("image", b), ("video", v), ("text", "what?")]
    assert [request.id for request in config.requests] == ["1", "z", "3"]
    assert config.requests[0].turns() == [("system", [("text", "be brief")]), ("user", expected)]
    assert config.requests[1].turns() == config.requests[0].turns()
    assert config.requests[2].turns() == [("user", [("text", "what?")])]
    assert config.requests[0].expected == "x"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("tensor_parallel: {tp_size: '4'}", ["tensor_parallel.tp_size = '4'", "a string", "integer"]),
        ("tensor_parallel: {tp_size: true}", ["tensor_parallel.tp_size = True", "a boolean", "integer"]),
        ("tensor_parallel: {tp_size: 2.0}", ["tensor_parallel.tp_size = 2.0", "a number", "integer"]),
        ("tensor_parallel: {tp_size: 0}", ["tensor_parallel.tp_size = 0", "greater than or equal to 1"]),
        ("tensor_parallel: {tpsize: 2}", ["tensor_parallel.tpsize", "did you mean 'tp_size'", "tp_size, vision"]),
        ("tensor_parallel:", ["tensor_parallel = None", "null", "a mapping"]),
        ("weights: {format: int5}", ["weights.format = 'int5'", "'dense'"]),
        ("batch_size: 0", ["batch_size = 0", "greater than or equal to 1"]),
        ("batch_size: yes", ["batch_size = True", "a boolean"]),
        ("procesor: {}", ["procesor", "did you mean 'processor'"]),
        ("tp_size: 2", ["tp_size = 2", "did you mean 'tensor_parallel.tp_size'"]),
        ("max_new_tokens: 5", ["did you mean 'generation.max_new_tokens'"]),
        ("processor: {format: int8}", ["processor.format", "did you mean 'weights.format'", "known: fps"]),
        ("outputs: x", ["outputs", "unknown key", "known: batch_size, deepspeed"]),
        ("output: [x]", ["output", "path of a file"]),
        ("3: x", ["3", "should be strings"]),
        ("processor: {fps: .nan}", ["processor.fps = nan", "finite"]),
        ("processor: {fps: -.inf}", ["processor.fps = -inf"]),
        ("processor: {fps: 0}", ["processor.fps = 0", "greater than 0"]),
        ("processor: {fps: 1e-1}", ["processor.fps = '1e-1'", "1.0e-5"]),
        ("processor: {max_frames: 1}", ["processor.max_frames = 1", "greater than or equal to 2"]),
        ("processor: {min_pixels: 9, max_pixels: 8}", ["processor.max_pixels = 8", "min_pixels = 9"]),
        ("deepspeed: [1]", ["deepspeed = [1]", "a list", "a mapping"]),
        ("generation: 5", ["generation = 5", "an integer", "a mapping"]),
        ("generation: {max_new_token: 5}", ["generation.max_new_token = 5", "did you mean 'max_new_tokens'"]),
        ("generation: {max_new_tokens: '5'}", ["generation.max_new_tokens = '5'", "a string"]),
        ("generation: {max_new_tokens: 0}", ["generation.max_new_tokens = 0"]),
        ("generation: {do_sample: 1}", ["generation.do_sample = 1", "boolean"]),
        ("generation: {top_p: 1.5}", ["generation.top_p = 1.5", "less than or equal to 1"]),
        ("generation: {max_time: 3}", ["generation.max_time = 3", "clock"]),
        ("generation: {cache_implementation: magic}", ["generation.cache_implementation = 'magic'", "shard"]),
        ("generation: {max_length: 9}", ["generation.max_length", "max_new_tokens"]),
        ("generation: {temperature: 0.5}", ["generation = {'temperature': 0.5}", "temperature", "do_sample"]),
        ("generation: {early_stopping: maybe}", ["generation", "early_stopping", "maybe"]),
        ("model: {path: model, dtype: float32, attn_implementation: flash_attention_2}",
         ["model.attn_implementation = 'flash_attention_2'", "half precision", "bfloat16", "sdpa"]),
        ("generation: {num_return_sequences: 2}", ["generation.num_return_sequences = 2", "twice"]),
        ("generation: {eos_token_id: end}", ["generation.eos_token_id = 'end'", "a list"]),
        ("requests: no.jsonl", ["requests", "no.jsonl", "No such file"]),
        ("requests: {prompt: x}", ["requests", "a mapping", "a list"]),
        ("requests: [x]", ["requests.0 = 'x'", "a mapping"]),
        ("requests: [{}]", ["requests.0.messages", "exactly one of prompt and messages"]),
        ("requests: [{prompt: a, messages: [{role: user, content: b}]}]", ["requests.0", "exactly one"]),
        ("requests: [{prompt: 3}]", ["requests.0.prompt = 3", "an integer", "string"]),
        ("requests: [{prompt: a, expected: 2024-01-01}]", ["requests.0.expected", "a date; it should be"]),
        ("requests: [{prompt: a, id: 7}]", ["requests.0.id = 7", "an integer", "string"]),
        ("requests: [{prompt: a, id: ''}]", ["requests.0.id = ''"]),
        ("requests: [{prompt: a, images: x.png}]", ["requests.0.images = 'x.png'", "a list"]),
        ("requests: [{prompt: a, images: ['']}]", ["requests.0.images.0 = ''"]),
        ("requests: [{prompt: a, image: [x]}]", ["requests.0.image", "did you mean 'images'"]),
        ("requests: [{prompt: a, videos: [[]]}]", ["requests.0.videos.0", "at least one"]),
        ("requests: [{prompt: a, videos: [[1]]}]", ["requests.0.videos.0.0 = 1"]),
        ("requests: [{prompt: a, min_pixels: 9, max_pixels: 8}]", ["requests.0.max_pixels = 8", "min_pixels = 9"]),
        ("requests: [{prompt: a}, {prompt: b, id: '1'}]", ["requests.0 and requests.1", "'1'", "must differ"]),
        ("requests: [{messages: []}]", ["requests.0.messages", "at least one"]),
        ("requests: [{messages: [{role: user, content: []}]}]", ["requests.0.messages.0.content", "at least one"]),
        ("requests: [{messages: [{role: boss, content: a}]}]", ["requests.0.messages.0.role = 'boss'", "'assistant'"]),
        ("requests: [{messages: [{role: user, content: a}], images: [b]}]", ["requests.0.messages", "images", "parts"]),
        ("requests: [{messages: [{role: user, content: [{type: imag}]}]}]", ["content.0.type = 'imag'", "'image'"]),
        ("requests: [{messages: [{role: user, content: [{type: image}]}]}]", ["content.0.type", "the key 'image'"]),
        ("requests: [{messages: [{role: user, content: [{type: text, text: a, image: b}]}]}]", ["content.0", "'text'"]),
    ],
)  # fmt: skip
def test_bad_values_name_the_key_the_value_and_what_is_allowed(home, yaml, words):
    model = "" if yaml.startswith("model:") else "model: {path: model}\n"
    message = complaint(load_config, write(home, model + yaml))
    assert message.startswith(f"{home / 'c.yaml'}: 1 problem\n"), message
    for word in words:
        assert word in message


def test_every_problem_is_reported_at_once(home):
    path = write(
        home, "model: {path: gone, dtyp: x}\nbatch_size: 0\ngeneration: {nonsense: 1, top_k: -1}\n"
        "requests: [{promt: a, id: a, min_pixels: 0}, {prompt: a, messages: b, id: a}]",
    )  # fmt: skip
    message = complaint(load_config, path, ["weights.format=x", "nothing", "a..b=1", "deepspeed={"])
    for key in (
        "model.path", "model.dtyp", "batch_size", "generation.nonsense", "generation.top_k", "requests.0.promt",
        "requests.0.messages", "requests.0.min_pixels", "requests.1.messages", "requests.0 and requests.1",
        "weights.format", "override 'nothing'", "override 'a..b=1'", "override 'deepspeed={'",
    ):  # fmt: skip
        assert key in message, key
    assert f"{message.count(chr(10))} problems" in message


GOOD = "model: {path: model}\n"
BY_FILE, BY_OVERRIDE, BY_BOTH = "{file}", "command line", "{file} and the command line"


@pytest.mark.parametrize("yaml, overrides, blamed, lines", [
    (GOOD, ["tensor_parallel.tpsize=2"], BY_OVERRIDE, ["override tensor_parallel.tpsize = 2: unknown key"]),
    (GOOD, ["modle.path=x"], BY_OVERRIDE, ["override modle = {'path': 'x'}: unknown key; did you mean 'model'?"]),
    (GOOD, ["model=null"], BY_OVERRIDE, ["override model = None: null; it should be a mapping"]),
    (GOOD, ["model={dtype: float32}"], BY_OVERRIDE, ["override model.path: missing"]),
    (GOOD, ["generation.topk=1"], BY_OVERRIDE, ["override generation.topk = 1: unknown name; did you mean 'top_k'?"]),
    (GOOD, ["requests=gone.jsonl"], BY_OVERRIDE, ["override requests: "]),
    (GOOD, ["nothing"], BY_OVERRIDE, ["override 'nothing': write key.sub=value"]),
    (GOOD + "batch_size: 0", ["weights.format=x"], BY_BOTH, ["batch_size = 0: ", "override weights.format = 'x': "]),
    (GOOD + "batch_size: 0", ["tensor_parallel.tp_size=2"], BY_FILE, ["batch_size = 0: "]),
    ("model: {dtype: float32}", ["model.revision=main"], BY_FILE, ["model.path: missing"]),
    (GOOD + "tensor_parallel: [2]", ["tensor_parallel.tp_size=2"], BY_BOTH,
     ["override it as a whole", "tensor_parallel = [2]: a list; "]),
    (GOOD + "generation: {num_beams: 2}", ["generation.num_beam_groups=3"], BY_OVERRIDE,
     ["override generation.num_beam_groups = 3: not supported"]),
    (GOOD + "generation: {min_new_tokens: 9}", ["generation.max_new_tokens=x"], BY_OVERRIDE, ["max_new_tokens"]),
])
def test_a_problem_is_blamed_on_who_stated_it(home, yaml, overrides, blamed, lines):
    file = write(home, yaml)
    message = complaint(load_config, file, overrides)
    heading, *rest = message.split("\n  - ")
    assert heading.rpartition(": ")[0] == blamed.format(file=file), message
    for line in lines:
        assert any(line in found for found in rest), message
    marked = [found.startswith("override ") for found in rest]
    assert sum(marked) == (len(rest) if blamed == BY_OVERRIDE else blamed == BY_BOTH), message


def test_what_generation_as_a_whole_must_be_is_blamed_on_both(home):
    file = write(home, GOOD + "generation: {do_sample: false}")
    message = complaint(load_config, file, ["generation.temperature=0.5"])
    assert message.startswith(f"{file} and the command line: 1 problem\n"), message
    assert "with overrides generation = {'do_sample': False, 'temperature': 0.5}: Transformers refuses it" in message


def test_an_override_into_what_has_no_keys(home):
    path = write(home, "model: {path: model}\nrequests: [{prompt: a}]")
    assert "override it as a whole" in complaint(load_config, path, ["requests.0.prompt=b"])


def test_a_model_path_that_is_not_there(home):
    path = write(home, "model: {path: Qwen/Qwen2-VL-7B-Instruct, revision: v1}")
    assert load_config(path, download=False).model.path == Path("Qwen/Qwen2-VL-7B-Instruct")  # see test_hub.py
    assert f"no such directory: {home}/gone" in complaint(load_config, write(home, "model: {path: ./gone}"))
    assert "model.revision = 'v1'" in complaint(load_config, write(home, "model: {path: ./model, revision: v1}"))
    assert "not a directory" in complaint(load_config, write(home, "model: {path: c.yaml}"))
    for nothing in ("3", "", "' '"):
        assert "the directory of a checkpoint" in complaint(load_config, write(home, f"model: {{path: {nothing}}}"))
    assert "model: missing" in complaint(load_config, write(home, "batch_size: 1"))
    assert "model.path: missing" in complaint(load_config, write(home, "model: {}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment", "is empty"),
        ("- a", "a list"),
        ("just words", "a string"),
        ("model: {path: model}\nbatch_size: 1\nbatch_size: 2", "line 3: the key 'batch_size' is given twice"),
        ("model: {path: model, path: model}", "line 1: the key 'path' is given twice"),
        ("model:\n  path: [", "line 2"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: !!python/object/apply:os.getcwd []", "line 1"),
        ("a: *nowhere", "line 1"),
        ("--- {a: 1}\n--- {b: 1}", "line 2"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("[" * 600, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_line(home, text, words):
    message = complaint(load_config, write(home, text))
    assert str(home / "c.yaml") in message
    assert words in message


def test_merge_keys_are_not_duplicates(home):
    text = "model: {path: model}\ndeepspeed: {a: &a {x: 1, y: 1}, b: &b {<<: *a, x: 2}, c: {<<: *b, y: 3}}"
    merged = load_config(write(home, text)).deepspeed
    assert (merged["b"], merged["c"]) == ({"x": 2, "y": 1}, {"x": 2, "y": 3})


def test_files_that_cannot_be_read(home):
    assert "No such file" in complaint(load_config, home / "gone.yaml")
    assert "--config wants a YAML file, and a model's directory goes into it" in complaint(load_config, home)
    (home / "c.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read" in complaint(load_config, home / "c.yaml")


def test_json_lines_name_file_and_line(home):
    lines = [
        '{"prompt": "a"}', "", "{", "[1]", '{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "imgaes": []}',
        '{"prompt": "b", "id": "1"}', "[" * 100_000,
    ]  # fmt: skip
    write(home, "\n".join(lines), "r.jsonl")
    message = complaint(load_config, write(home, "model: {path: model}\nrequests: r.jsonl"))
    where = f"{home / 'r.jsonl'}:"
    assert f"{where}3: not a JSON object" in message
    assert f"{where}4 = [1]: a list" in message
    assert f"{where}5: not a JSON object: key 'prompt' appears twice" in message
    assert f"{where}6 imgaes = []: unknown key; did you mean 'images'?" in message
    assert f"{where}1 and {where}7 have the same id '1'" in message
    assert f"{where}8: not a JSON object" in message
    assert f"{where}2" not in message
    write(home, "\n", "r.jsonl")
    assert "holds no requests" in complaint(load_config, home / "c.yaml")


def test_values_that_contain_themselves_do_not_end_in_a_traceback(home):
    for text in ("requests: &a [*a]", "generation: &a {x: *a}", "processor: &a {fps: *a}", "requests: [&a {id: *a}]"):
        complaint(load_config, write(home, f"model: {{path: model}}\n{text}"))


def test_parse_request(home):
    request = parse_request({"id": "a", "prompt": "q", "images": ["a.png"]}, home)
    assert request.images == (str(home / "a.png"),)
    assert complaint(parse_request, {"prompt": 3, "x": 1}, home, "body").startswith("body: 3 problems")
