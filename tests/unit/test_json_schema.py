"""configs/schema.json, which editors read: it is what the code says, and what each config names in its first line."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from launching import ROOT

from adapter.config.json_schema import json_schema

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = ROOT / "configs" / "schema.json"


def test_the_file_is_what_the_code_says():
    assert json.loads(SCHEMA.read_text()) == json_schema(), "python -m adapter.config.json_schema > configs/schema.json"


def test_every_key_is_explained():
    schema = json_schema()
    silent = {f"{name}.{key}" for name, section in schema["$defs"].items() if name != "Generation"
              for key, value in section["properties"].items() if "description" not in value and "$ref" not in value}
    assert silent == {"Part.text", "Part.image_url", "Message.role"}
    assert all("description" in value or "$ref" in value for value in schema["properties"].values())


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_names_it_and_fits(file):
    """By a validator of the few words of JSON Schema that the file has."""
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text())
    assert named and (file.parent / named[1]).resolve() == SCHEMA
    schema = json.loads(SCHEMA.read_text())
    assert list(misfits(yaml.safe_load(file.read_text()), schema, schema)) == []


@pytest.mark.parametrize(("text", "wrong"), [
    ("{model: {path: a}, tensor_parallel: {tpsize: 2}}", "tpsize"), ("{tensor_parallel: {}}", "model"),
    ("{model: {path: a, dtype: int3}}", "dtype"), ("{model: {path: a}, requests: [{promt: a}]}", "promt"),
    ("{model: {path: a}, requests: 3}", "requests"), ("{model: {path: a}, generation: {do_sample: 1}}", "do_sample"),
])  # fmt: skip
def test_what_does_not_fit_is_seen(text, wrong):
    schema = json_schema()
    assert any(wrong in misfit for misfit in misfits(yaml.safe_load(text), schema, schema))


@pytest.mark.parametrize("text", [
    "{model: {path: a}, requests: r.jsonl}", "{model: {path: a}, requests: [{prompt: a, videos: [[f.png], v.mp4]}]}",
    "{model: {path: a}, requests: [{messages: [{role: user, content: a}]}], deepspeed: {anything: 1}}",
    "{model: {path: a}, generation: {eos_token_id: 3, top_h: 0.5}}",
])  # fmt: skip
def test_every_form_of_the_yaml_fits(text):
    schema = json_schema()
    assert list(misfits(yaml.safe_load(text), schema, schema)) == []


KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
         "object": dict}


def misfits(value, schema, root, at="config"):
    """What of a value does not fit a JSON schema, by its kinds, keys, choices and unions."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for union in ("anyOf", "oneOf"):
        if union in schema and all(list(misfits(value, choice, root, at)) for choice in schema[union]):
            yield f"{at}: {value!r} fits none of {schema[union]}"
    kind = schema.get("type")
    if kind and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        yield f"{at}: {value!r} is no {kind}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    elif kind == "array":
        for index, item in enumerate(value):
            yield from misfits(item, schema["items"], root, f"{at}.{index}")
    elif kind == "object":
        keys = schema.get("properties", {})
        yield from (f"{at}.{key}: missing" for key in schema.get("required", []) if key not in value)
        for key, item in value.items():
            if key in keys:
                yield from misfits(item, keys[key], root, f"{at}.{key}")
            elif schema.get("additionalProperties", True) is False:
                yield f"{at}.{key}: unknown"
