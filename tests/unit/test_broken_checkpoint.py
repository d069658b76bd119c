"""Broken checkpoints are one message with file, tensor and reason, all of them at once; files that break later too."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, newer_name
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import FIRST, SECOND, SMALL

from adapter.checkpoint import safetensors as module
from adapter.checkpoint.safetensors import INDEX, SINGLE, open_checkpoint
from adapter.planning.load import checked_plan, make_plan
from policies.errors import UserError
from policies.families.qwen2_vl import POLICY


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header, body: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


def edit(file: str, **entry):
    """A breaker that changes the header entry of the file's last tensor that has two dimensions."""
    def apply(directory: Path) -> None:
        header, body = header_of(directory / file)
        name = last_matrix(header)
        header[name] |= {k: v(header[name][k]) if callable(v) else v for k, v in entry.items()}
        write(directory / file, header, body)
    return apply


def last_matrix(header: dict) -> str:
    return max((n for n in header if len(header[n].get("shape", ())) == 2), key=lambda n: header[n]["data_offsets"])


def save(file: str, change):
    """A breaker that saves the file again with other tensors."""
    def apply(directory: Path) -> None:
        tensors = load_file(directory / file)
        change(tensors)
        save_file(tensors, directory / file)
    return apply


def move(directory: Path, file: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (directory / INDEX).write_text(json.dumps(index))


def shift(by: int):
    """A breaker that moves the last tensor of the second file by so many bytes, and the end of the file with it."""
    def apply(directory: Path) -> None:
        header, body = header_of(directory / SECOND)
        header.pop("__metadata__", None)
        last = max(header, key=lambda n: header[n]["data_offsets"])
        header[last]["data_offsets"] = [o + by for o in header[last]["data_offsets"]]
        write(directory / SECOND, header, body + bytes(by) if by > 0 else body[:by])
    return apply


def alter(change):
    """A breaker of config.json."""
    def apply(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))
    return apply


def alter_vision(**changes):
    return alter(lambda config: config["vision_config"].update(changes))


def text(name: str, content: str):
    return lambda directory: (directory / name).write_text(content)


def resize(file: str, size):
    return lambda directory: os.truncate(directory / file, size((directory / file).stat().st_size))


def only_pickles(directory: Path) -> None:
    for file in directory.glob("*safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"PK")


NORM = "model.norm.weight"
HOLDER, OTHER = (SECOND, FIRST) if list(SMALL.tensors()).index(NORM) % 2 else (FIRST, SECOND)  # who holds it, who not
FILES = {
    "missing file": (lambda d: (d / SECOND).unlink(), [SECOND, "missing from"]),
    "truncated body": (resize(SECOND, lambda size: size - 100), [SECOND, "truncated", "tensor '"]),
    "truncated header": (resize(SECOND, lambda size: 200), [SECOND, "truncated", "200 bytes"]),
    "three bytes": (resize(SECOND, lambda size: 3), [SECOND, "truncated", "3 bytes"]),
    "empty": (resize(SECOND, lambda size: 0), [SECOND, "0 bytes"]),
    "trailing bytes": (resize(SECOND, lambda size: size + 10), [SECOND, "but the file has"]),
    "garbage": (lambda d: (d / SECOND).write_bytes(b"\xff\x00garbage" * 99), [SECOND, "not a safetensors file"]),
    "git-lfs pointer": (text(SECOND, "version https://git-lfs.github.com/spec/v1\noid 1\n"), [SECOND, "git lfs pull"]),
    "huge header": (lambda d: (d / SECOND).write_bytes((2**62).to_bytes(8, "little") + b"{}"), [SECOND, str(2**62)]),
    "header not JSON": (lambda d: write(d / SECOND, b"{nonsense"), [SECOND, "property name"]),
    "header not UTF-8": (lambda d: write(d / SECOND, b"{\"\xff\": 1}"), [SECOND, "utf-8"]),
    "header a list": (lambda d: write(d / SECOND, []), [SECOND, "a list, a mapping is needed"]),
    "header nested deep": (lambda d: write(d / SECOND, b"[" * 200_000), [SECOND]),
    "entry a number": (lambda d: write(d / SECOND, {"x": 5}), [SECOND, "'x'", "header entry 5"]),
    "entry without dtype": (lambda d: write(d / SECOND, {"x": {"shape": [1]}}), [SECOND, "'x'", "header entry"]),
    "shape of strings": (edit(SECOND, shape=["4", "6"]), [SECOND, "tensor '", "header entry"]),
    "shape a number": (edit(SECOND, shape=24), [SECOND, "tensor '", "header entry"]),
    "negative shape": (edit(SECOND, shape=lambda s: [-n for n in s]), [SECOND, "tensor '", "header entry"]),
    "three offsets": (edit(SECOND, data_offsets=[0, 1, 2]), [SECOND, "tensor '", "header entry"]),
    "offsets as fractions": (edit(SECOND, data_offsets=[0.0, 4.0]), [SECOND, "tensor '", "header entry"]),
    "negative offset": (edit(SECOND, data_offsets=lambda o: [-8, o[1] - o[0] - 8]), [SECOND, "header entry"]),
    "offsets out of order": (edit(SECOND, data_offsets=lambda o: o[::-1]), [SECOND, "tensor '", "do not hold"]),
    "too few bytes": (edit(SECOND, shape=lambda s: [s[0] + 1, s[1]]), [SECOND, "tensor '", "do not hold"]),
    "overlap": (shift(-8), [SECOND, "tensor '", "begins at byte"]),
    "hole": (shift(8), [SECOND, "tensor '", "begins at byte"]),
    "wrong shape": (edit(SECOND, shape=lambda s: s[::-1]), [SECOND, "tensor '", "has shape", "config.json says"]),
    "integers": (save(HOLDER, lambda t: t.update({NORM: torch.arange(24)})),
                 [HOLDER, NORM, "dtype I64; known: F64, F32, F16, BF16"]),
    "extra tensor": (save(FIRST, lambda t: t.update({"audio.proj.weight": torch.ones(2)})),
                     [FIRST, "'audio.proj.weight' is not part of a qwen2_vl"]),
    "missing tensor": (save(HOLDER, lambda t: t.pop(NORM)), [INDEX, HOLDER, NORM, "does not hold it"]),
    "tensor in two files": (
        save(OTHER, lambda t: t.update({NORM: torch.ones(24)})), [SECOND, f"{NORM!r} is also in {FIRST}"]),
    "both names of a tensor": (
        save(HOLDER, lambda t: t.update({newer_name(NORM): torch.ones(24)})), [HOLDER, "is also in"]),
    "promise not kept": (lambda d: move(d, OTHER), []),
    "index above the directory": (lambda d: move(d, "../x.safetensors"), [INDEX, "'../x.safetensors'", "plain file"]),
    "index to an absolute path": (lambda d: move(d, "/etc/passwd"), [INDEX, "'/etc/passwd'", "plain file name"]),
    "index to the directory itself": (lambda d: move(d, ".."), [INDEX, "'..'", "plain file name"]),
    "index to nothing": (lambda d: move(d, ""), [INDEX, "''", "plain file name"]),
    "index not JSON": (text(INDEX, "{"), [INDEX, "cannot be read"]),
    "index a list": (text(INDEX, "[]"), [INDEX, "cannot be read"]),
    "index without a map": (text(INDEX, "{}"), [INDEX, "weight_map"]),
    "index map a list": (text(INDEX, '{"weight_map": [1]}'), [INDEX, "cannot be read"]),
    "index nested deep": (text(INDEX, "[" * 200_000), [INDEX, "cannot be read"]),
    "index of nothing": (text(INDEX, '{"weight_map": {}}'), [f"tensor {n!r}" for n in SMALL.tensors()]),
    "no safetensors": (only_pickles, ["no safetensors file here", "save_pretrained"]),
}
HEADS = "num_attention_heads"
CONFIG = {
    "no config.json": (lambda d: (d / "config.json").unlink(), ["no config.json here"]),
    "config.json not JSON": (text("config.json", "{'a': 1}"), ["config.json", "cannot be read as JSON"]),
    "config.json not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), ["cannot be read as JSON"]),
    "config.json nested deep": (text("config.json", "[" * 200_000), ["config.json", "cannot be read"]),
    "config.json with a number too long": (text("config.json", "9" * 5000), ["config.json", "cannot be read"]),
    "config.json a list": (text("config.json", "[]"), ["config.json", "holds a list, a mapping is needed"]),
    "unknown model_type": (alter(lambda c: c.update(model_type="qwen2_vx")), ["'qwen2_vx'", "nearest", "'qwen2_vl'"]),
    "no model_type": (alter(lambda c: c.pop("model_type")), ["model_type", "known: qwen2_5_vl, qwen2_vl"]),
    "no heads": (alter(lambda c: c.pop(HEADS)), ["config.json", HEADS, "missing"]),
    "negative layers": (alter(lambda c: c.update(num_hidden_layers=-1)), ["num_hidden_layers", "-1", "positive"]),
    "no layers": (alter(lambda c: c.update(num_hidden_layers=0)), ["num_hidden_layers", "is 0", "positive"]),
    "heads as text": (alter(lambda c: c.update({HEADS: "6"})), [HEADS, "'6'", "whole number"]),
    "heads as fraction": (alter(lambda c: c.update({HEADS: 6.0})), [HEADS, "6.0", "whole number"]),
    "heads as truth": (alter(lambda c: c.update({HEADS: True})), [HEADS, "True", "whole number"]),
    "heads not dividing hidden": (alter(lambda c: c.update({HEADS: 5})), ["hidden_size 24", f"{HEADS} 5"]),
    "more heads than hidden": (alter(lambda c: c.update({HEADS: 30})), ["hidden_size 24", f"{HEADS} 30"]),
    "KV heads not dividing heads": (alter(lambda c: c.update(num_key_value_heads=4)), [f"{HEADS} 6", "heads 4"]),
    "odd head_dim": (alter(lambda c: c.update({HEADS: 8})), ["head_dim 3", "not even"]),
    "vision heads not dividing": (alter_vision(num_heads=5), ["embed_dim 12", "num_heads 5"]),
    "vision head_dim 6": (alter_vision(num_heads=2), ["head_dim 6", "multiple of 4"]),
    "vision heads as text": (alter_vision(num_heads="3"), ["num_heads", "'3'"]),
    "vision_config a list": (alter(lambda c: c.update(vision_config=[1])), ["vision_config", "mapping"]),
    "text_config a string": (alter(lambda c: c.update(text_config="qwen")), ["text_config", "mapping"]),
    "mlp_ratio as text": (alter_vision(mlp_ratio="4"), ["mlp_ratio", "'4'"]),
    "mlp_ratio null": (alter_vision(mlp_ratio=None), ["mlp_ratio", "None"]),
    "mlp_ratio not a number": (alter_vision(mlp_ratio=float("nan")), ["mlp_ratio", "nan"]),
    "tying as text": (alter(lambda c: c.update(tie_word_embeddings="false")), ["tie_word_embeddings", "'false'"]),
    "other layer count": (alter(lambda c: c.update(num_hidden_layers=2)), ["'model.layers.1.mlp.up_proj.weight'"]),
}
BROKEN = FILES | CONFIG


def complaint(directory: Path, tp: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        checked_plan(directory, tp, "float32")
    return str(caught.value)


@pytest.mark.parametrize("how", [how for how, (_, words) in BROKEN.items() if words])
def test_broken_input_is_named(tmp_path, how):
    make_checkpoint(tmp_path, SMALL)
    apply, words = BROKEN[how]
    apply(tmp_path)
    message = complaint(tmp_path)
    assert all(w in message for w in words), message


FORMAT = ["truncated body", "truncated header", "garbage", "huge header", "header not JSON", "header a list", "overlap",
          "hole", "offsets out of order", "negative offset", "too few bytes", "trailing bytes"]


@pytest.mark.parametrize("how", FORMAT)
def test_the_format_is_read_as_strictly_as_by_safetensors(tmp_path, how):
    make_checkpoint(tmp_path, SMALL)
    BROKEN[how][0](tmp_path)
    with pytest.raises(SafetensorError):
        for file in (FIRST, SECOND):
            with safe_open(tmp_path / file, "pt") as opened:
                opened.keys()


def test_one_broken_file_is_one_problem(tmp_path):
    """Not one more for each tensor that it was to hold."""
    for how in ("missing file", "truncated body", "garbage", "index not JSON", "missing tensor"):
        make_checkpoint(tmp_path / how, SMALL)
        BROKEN[how][0](tmp_path / how)
        assert len(make_plan(tmp_path / how, 2, "float32")[2]) == 1, how
    make_checkpoint(tmp_path / "one", SMALL, files=1)
    os.truncate(tmp_path / "one" / SINGLE, 300)
    assert len(make_plan(tmp_path / "one", 2, "float32")[2]) == 1


def test_a_tensor_in_another_file_than_promised_is_found(tmp_path):
    make_checkpoint(tmp_path, SMALL)
    BROKEN["promise not kept"][0](tmp_path)
    _, checkpoint = checked_plan(tmp_path, 2, "float32")
    assert checkpoint.tensors[NORM].file.name == HOLDER


def test_an_untied_head_must_be_there(tmp_path):
    make_checkpoint(tmp_path, SMALL, files=1)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / SINGLE)
    assert "tensor 'lm_head.weight' [37, 24] is missing" in complaint(tmp_path)


def test_another_problem_does_not_hide_a_missing_tensor(tmp_path):
    make_checkpoint(tmp_path, SMALL, files=1)
    save(SINGLE, lambda t: t.update({newer_name(NORM): t[NORM].clone()}) or t.pop("lm_head.weight"))(tmp_path)
    message = complaint(tmp_path)
    assert "is also in" in message and "tensor 'lm_head.weight' [37, 24] is missing" in message


def test_everything_wrong_is_reported_at_once(tmp_path):
    make_checkpoint(tmp_path, SMALL, files=5)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    save(files[0], lambda t: t.update({"audio.proj.weight": torch.ones(2)}))(tmp_path)
    edit(files[1], shape=lambda s: s[::-1])(tmp_path)
    (tmp_path / files[2]).unlink()
    (tmp_path / files[3]).write_bytes(b"garbage " * 9)
    resize(files[4], lambda size: size - 1)(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] |= {"a.weight": "../a.safetensors", "b.weight": files[0]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    alter(lambda c: c.update(num_key_value_heads=4))(tmp_path)
    message = complaint(tmp_path, tp=7)
    for words in (*((f,) for f in files), ("audio.proj.weight",), ("has shape",), ("missing from",), ("truncated",),
                  ("../a.safetensors",), ("'b.weight'",), ("num_key_value_heads 4",), ("tp_size 7",)):
        assert all(w in message for w in words), (words, message)


@pytest.mark.parametrize("row", ["self_attn.q_proj", "visual.merger.ln_q"])
def test_a_row_missing_from_the_table_leaves_a_tensor_over(tmp_path, row):
    make_checkpoint(tmp_path, SMALL)
    policy = replace(POLICY, table=tuple(c for c in POLICY.table if not c.module.endswith(row)))
    found = open_checkpoint(tmp_path, policy).check(policy, policy.geometry(SMALL.config()))
    assert len(found) == 2 and all(f"{row}." in p and "is not part of" in p for p in found)


# What breaks after the headers were read

def opened(directory: Path):
    make_checkpoint(directory, SMALL, files=1)
    return checked_plan(directory, 2, "float32")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", NORM])
def test_a_file_truncated_later_is_a_user_error_that_names_file_and_tensor(tmp_path, name):
    plan, checkpoint = opened(tmp_path)
    part = plan.slice(*name.rsplit(".", 1), 1)
    os.truncate(tmp_path / SINGLE, checkpoint.tensors[name].offset + checkpoint.tensors[name].nbytes - 1)
    with pytest.raises(UserError) as caught:
        checkpoint.read(name, part)
    assert SINGLE in str(caught.value) and repr(name) in str(caught.value) and "truncated" in str(caught.value)


def test_a_file_removed_later_is_a_user_error(tmp_path):
    plan, checkpoint = opened(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be opened: No such file"):
        checkpoint.read(NORM, plan.slice("model.norm", "weight", 0))


def test_an_input_output_error_is_a_user_error(tmp_path, monkeypatch):
    plan, checkpoint = opened(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", fail)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: Input/output error"):
        checkpoint.read(NORM, plan.slice("model.norm", "weight", 0))
