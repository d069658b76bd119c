"""Shards that are damaged, or of another model, are one message that names file and tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, launch
from test_shards import MLP, NORM, complaint, left, opened, written

from adapter.checkpoint.sharded import MANIFEST, open_shards
from adapter.config.load import from_dict, load_config
from adapter.config.schema import Weights
from adapter.planning.load import make_plan
from policies.errors import UserError

# What does not fit is reported, all of it

def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST).read_text())
        change(manifest)
        (directory / MANIFEST).write_text(json.dumps(manifest))

    return apply


def edit_header(change: Callable[[dict], object], rank: int = 1) -> Callable[[Path], None]:
    """Change a file's header, its data as it is."""
    def apply(directory: Path) -> None:
        file = directory / f"rank-{rank:02d}-of-02.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def resize(by: int) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "rank-01-of-02.safetensors"
        os.truncate(file, file.stat().st_size + by)

    return apply


def config_json(**changes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return apply


def replaced(text: str | bytes) -> Callable[[Path], None]:
    return lambda d: (d / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def fifo(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    os.mkfifo(directory / MANIFEST)


FIRST, SECOND = "rank-00-of-02.safetensors", "rank-01-of-02.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (resize(-1), [SECOND, "truncated"]),
    "longer": (resize(1), [SECOND, "has"]),
    "missing file": (lambda d: (d / SECOND).unlink(), [SECOND, "missing from"]),
    "a fifo for a file": (lambda d: ((d / SECOND).unlink(), os.mkfifo(d / SECOND)), [SECOND, "not a regular file"]),
    "no tensor": (lambda d: (d / SECOND).write_bytes((2).to_bytes(8, "little") + b"{}"), [SECOND, "holds no tensor"]),
    "another size": (edit(lambda m: m["files"][1].update(bytes=5)), [SECOND, "bytes, shards.json says 5"]),
    "files of two ranks swapped": (lambda d: ((d / FIRST).rename(d / "x"), (d / SECOND).rename(d / FIRST),
                                              (d / "x").rename(d / SECOND)), [FIRST, SECOND, "this rank's shard has"]),
    "renamed tensor": (edit_header(lambda h: h.update(other=h.pop(NORM))),
                       [SECOND, "'other' is not part", f"{NORM!r} [24] is missing"]),
    "another dtype": (edit_header(lambda h: h[NORM].update(dtype="I32")), [SECOND, NORM, "of I32", "of F32"]),
    "another shape": (edit_header(lambda h: h[NORM].update(shape=[2, 12])), [SECOND, NORM, "[2, 12]", "[24]"]),
    "more bytes than the shape": (edit_header(lambda h: h[NORM].update(dtype="U8")), [SECOND, NORM]),
    "a file outside": (edit(lambda m: m["files"][0].update(name="../model/" + FIRST)), [MANIFEST, "'../model/rank-00"]),
    "an absolute path": (edit(lambda m: m["files"][0].update(name="/etc/passwd")), [MANIFEST, "/etc/passwd"]),
    "a file twice": (edit(lambda m: m["files"][1].update(name=FIRST)), [MANIFEST, "must be", SECOND]),
    "a file less": (edit(lambda m: m["files"].pop()), [MANIFEST, "must be", SECOND]),
    "endless name": (edit(lambda m: m["files"][0].update(name="x" * 5000)), [MANIFEST, "files.0.name", "at most 100"]),
    "negative size": (edit(lambda m: m["files"][0].update(bytes=-1)), [MANIFEST, "files.0.bytes"]),
    "absurd size": (edit(lambda m: m["files"][0].update(bytes=10**30)), [FIRST, str(10**30)]),
    "digest of another kind": (edit(lambda m: m["files"][0].update(sha256="abc")), [MANIFEST, "sha256"]),
    "absurd tp_size": (edit(lambda m: m.update(tp_size=10**9)), [MANIFEST, "tp_size", "1024"]),
    "more ranks than heads": (edit(lambda m: m.update(tp_size=7)), [MANIFEST, "each rank needs a query head"]),
    "tp_size as text": (edit(lambda m: m.update(tp_size="2")), [MANIFEST, "tp_size = '2'"]),
    "a newer version": (edit(lambda m: m.update(version=2)), [MANIFEST, "version = 2", "launch/shard.py again"]),
    "an unknown key": (edit(lambda m: m.update(exec="rm")), [MANIFEST, "exec"]),
    "a missing key": (edit(lambda m: m.pop("slicing")), [MANIFEST, "slicing"]),
    "another model_type": (edit(lambda m: m.update(model_type="llama")), ["'llama'", "'qwen2_vl'"]),
    "another group": (edit(lambda m: m.update(group=32)), ["for 32 weights", "64"]),
    "slices of another policy": (edit(lambda m: m.update(slicing="0" * 64)), ["another policy", "shard.py again"]),
    "not JSON": (replaced("nonsense"), [MANIFEST]),
    "a list": (replaced("[]"), [MANIFEST]),
    "nested for ever": (replaced("[" * 100_000), [MANIFEST]),
    "not UTF-8": (replaced(b"\xff\xfe"), [MANIFEST, "cannot be read"]),
    "two megabytes": (replaced(" " * (2 << 20)), [MANIFEST, "at most"]),
    "a fifo": (fifo, [MANIFEST, "not a regular file"]),
    "a directory": (lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()), [MANIFEST, "cannot be read"]),
    "a link to nowhere": (lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).symlink_to("x")), [MANIFEST]),
    "another config.json": (config_json(intermediate_size=48), ["another policy or config.json", MLP, "[24, 24]"]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("sound"))[2]


@pytest.mark.parametrize("how", BROKEN)
def test_broken_shards_are_named(sound, tmp_path, how):
    directory = Path(shutil.copytree(sound, tmp_path / "shards"))
    change, words = BROKEN[how]
    change(directory)
    message = complaint(directory)
    assert all(word in message for word in words) and len(message) < 20_000, message


def test_broken_shards_are_not_read(sound, tmp_path):
    """Of a manifest that names files elsewhere, none is opened."""
    directory, seen = Path(shutil.copytree(sound, tmp_path / "shards")), []
    BROKEN["an absolute path"][0](directory)
    watching = [True]
    sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == "open" and watching else None)
    complaint(directory)
    watching.clear()
    assert any(MANIFEST in path for path in seen) and not any("passwd" in path or "rank-" in path for path in seen)


def test_a_config_that_wants_something_else_is_an_error_that_names_both_and_what_to_do(sound):
    message = complaint(sound, 4, "bfloat16", "int8", "data")
    for words in (("tp_size 2,", "is 4, its default where the config states none", "set tensor_parallel.tp_size=2",
                   "launch/shard.py with tensor_parallel.tp_size=4"),
                  ("model.dtype float32,", "is bfloat16, its default", "set model.dtype=float32"),
                  ("tensor_parallel.vision tensor,", "is data;", "set tensor_parallel.vision=tensor"),
                  ("weights.format dense,", "is int8;", "set weights.format=dense")):
        assert all(word in message for word in words), message
    assert "its default" not in complaint(sound, 3)


def test_everything_wrong_is_reported_at_once(sound, tmp_path):
    directory = Path(shutil.copytree(sound, tmp_path / "shards"))
    edit_header(lambda h: h[NORM].update(shape=[4, 6]), 0)(directory)
    resize(-1)(directory)
    edit(lambda m: m.update(model_type="llama", slicing="0" * 64))(directory)
    message = complaint(directory, 3)
    for word in ("is 3", "'llama'", "another policy", NORM, SECOND, "truncated"):
        assert word in message, (word, message)


def test_a_policy_that_cuts_otherwise_is_noticed(sound):
    """Its table, its boundaries or what it quantises: shapes may well be the same."""
    plan = make_plan(sound, 2, "float32")[0]
    swapped = [c if not c.module.endswith("k_proj") else replace(c, module=c.module.replace("k_proj", "kk_proj"))
               for c in plan.policy.table]
    for other in (replace(plan, policy=replace(plan.policy, table=tuple(swapped))),
                  replace(plan, policy=replace(plan.policy, tied=("a.weight", "b.weight"))),
                  replace(plan, policy=replace(plan.policy, head_axes={"q": ("text", "q"), "kv": ("text", "kv")}))):
        assert any("cut by another policy" in p for p in open_shards(sound, other).problems)
    assert open_shards(sound, plan).problems == []


# What breaks after the headers were read

def test_a_file_truncated_later_is_a_user_error_that_names_file_and_tensor(sound, tmp_path):
    directory = Path(shutil.copytree(sound, tmp_path / "shards"))
    shards = opened(directory, make_plan(directory, 2, "float32")[0])
    info = shards.files[1][NORM]
    os.truncate(shards.file(1), info.offset + info.nbytes - 1)
    shards.load(0)
    with pytest.raises(UserError, match=rf"{SECOND}: ends at byte {info.offset + info.nbytes - 1}, inside tensor "
                                        f"'{NORM}'; it was truncated"):
        shards.load(1)


def test_a_file_removed_later_is_a_user_error(sound, tmp_path):
    directory = Path(shutil.copytree(sound, tmp_path / "shards"))
    shards = opened(directory, make_plan(directory, 2, "float32")[0])
    shards.file(1).unlink()
    with pytest.raises(UserError, match=f"{SECOND}: cannot be opened: No such file"):
        shards.load(1)


# Commands and configs

def test_plan_works_on_shards_and_without_torch(sound, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{model: {{path: {sound}, dtype: float32}}, tensor_parallel: {{tp_size: 2}}}}")
    code = ("import sys, runpy\n"
            f"sys.argv = ['plan.py', '--config', {str(tmp_path / 'c.yaml')!r}, '--json', *sys.argv[1:]]\n"
            "try:\n    runpy.run_path('launch/plan.py', run_name='__main__')\n"
            "except SystemExit as end:\n    code = end.code or 0\n"
            "print(code, sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()), file=sys.stderr)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "0 []\n", done.stderr
    plan = make_plan(sound, 2, "float32")[0]
    facts = json.loads(done.stdout)
    assert facts["problems"] == [] and [r["weight_bytes"] for r in facts["ranks"]] == [
        plan.weight_bytes(0), plan.weight_bytes(1)]


def test_shards_are_not_sharded_again_nor_run_by_one_process(sound, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{model: {{path: {sound}, dtype: float32}}, tensor_parallel: {{tp_size: 2}}}}")
    for command, more in (("shard", ["--out", str(tmp_path / "again")]), ("one_process", [])):
        done = launch(1, ROOT / "launch" / f"{command}.py", "--config", str(tmp_path / "c.yaml"), *more,
                      launcher="alone")
        assert done.code == 2 and "weights.original" in done.err, done.err
        assert "Traceback" not in done.err, done.err
    assert left(tmp_path) == ["c.yaml"]


def test_the_original_is_what_is_sharded_where_the_config_has_both(sound, tmp_path):
    model = sound.parent / "model"
    (tmp_path / "c.yaml").write_text(f"{{model: {{path: {sound}, dtype: float32}}, tensor_parallel: {{tp_size: 3}}, "
                                     f"weights: {{original: {model}}}}}")
    done = launch(1, ROOT / "launch" / "shard.py", "--config", str(tmp_path / "c.yaml"), "--out",
                  str(tmp_path / "out"), launcher="alone")
    assert done.code == 0, done.err
    assert make_plan(tmp_path / "out", 3, "float32")[2] == []


def test_the_original_is_relative_to_whoever_states_it(tmp_path, monkeypatch):
    for name in ("home/m", "home/o", "here/o"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / "c.yaml").write_text("{model: {path: m}, weights: {original: o}}")
    monkeypatch.chdir(tmp_path / "here")
    assert load_config(tmp_path / "home" / "c.yaml").weights.original == tmp_path / "home" / "o"
    assert load_config(tmp_path / "home" / "c.yaml", ["weights.original=o"]).weights.original == tmp_path / "here" / "o"
    assert from_dict({"model": {"path": "m"}}, tmp_path / "home").weights == Weights()
    with pytest.raises(UserError, match=r"weights.original = 'gone': no such directory"):
        load_config(tmp_path / "home" / "c.yaml", ["weights.original=gone"])
