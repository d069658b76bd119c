"""Pre-sharded checkpoints: written is what a rank would hold, all of it or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import ROOT
from safetensors import safe_open

from adapter.checkpoint import sharded
from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import MANIFEST, Shards, entries, read_whole
from adapter.commands import shard
from adapter.commands.shard import write_shards
from adapter.kernels.linear import Quantised, make_weight
from adapter.planning.load import checked_plan, make_plan
from adapter.planning.plan import Plan
from policies.errors import UserError

UNEVEN = Shape(heads=6, kv_heads=2, head_dim=4, layers=1, mlp=40, vocab=37, v_heads=3, v_head_dim=4, v_layers=1)
GROUPED = Shape(heads=4, kv_heads=2, head_dim=64, layers=1, mlp=256, vocab=203, v_layers=1)
SHAPES = {"uneven": UNEVEN, "straddling": Shape(layers=1, v_layers=1), "tied": replace(UNEVEN, tied=True),
          "grouped": GROUPED, "grouped_tied": replace(GROUPED, tied=True, mlp=384)}
BIG = Shape(heads=8, kv_heads=2, head_dim=64, layers=7, mlp=4096, vocab=2000)  # its largest tensors are neighbours
NORM, MLP = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
CASES = [(shape, tp, "dense", dtype) for shape in ("uneven", "straddling", "tied") for tp in (1, 2, 3, 4)
         for dtype in ("float32", "bfloat16")]
CASES += [(shape, tp, form, dtype) for shape, tp, form, dtype in [
    ("grouped", 1, "int8", "bfloat16"), ("grouped", 2, "int4", "bfloat16"), ("grouped", 4, "int8", "float32"),
    ("straddling", 1, "int4", "float32"), ("grouped_tied", 2, "int8", "bfloat16"),
    ("grouped_tied", 3, "int4", "float32")]]


def original(directory: Path, shape: str = "uneven", tp: int = 2, dtype: str = "float32", form: str = "dense",
             vision: str = "tensor") -> tuple[Plan, Checkpoint]:
    plan, checkpoint = checked_plan(make_checkpoint(directory / "model", SHAPES[shape]), tp, dtype, vision, form)
    assert isinstance(checkpoint, Checkpoint)
    return plan, checkpoint


def written(directory: Path, *how) -> tuple[Plan, Checkpoint, Path]:
    plan, checkpoint = original(directory, *how)
    write_shards(plan, checkpoint, directory / "shards")
    return plan, checkpoint, directory / "shards"


def opened(directory: Path, plan: Plan) -> Shards:
    shards = checked_plan(directory, plan.tp_size, plan.dtype, plan.vision, plan.form.name)[1]
    assert isinstance(shards, Shards)
    return shards


def complaint(directory: Path, tp: int = 2, dtype: str = "float32", form: str = "dense",
              vision: str = "tensor") -> str:
    with pytest.raises(UserError) as caught:
        checked_plan(directory, tp, dtype, vision, form)
    return str(caught.value)


def equal(a, b) -> bool:
    if isinstance(a, Quantised) or isinstance(b, Quantised):
        alike = (a.bits, a.dtype, a.shape) == (b.bits, b.dtype, b.shape)
        return alike and equal(a.codes, b.codes) and equal(a.scales, b.scales)
    return a.dtype == b.dtype and torch.equal(a, b)


# What is written is what a rank would hold

@pytest.mark.parametrize(("shape", "tp", "form", "dtype"), CASES)
def test_every_tensor_of_every_rank(tmp_path, shape, tp, form, dtype):
    """Equal to what the rank would have read, cast and quantised; no byte read but these, a tied head not twice."""
    plan, checkpoint, directory = written(tmp_path, shape, tp, dtype, form)
    shards, read = opened(directory, plan), 0
    for rank in range(tp):
        held = shards.load(rank)
        names = {f"{m}.{s}" for m, s in plan.parameters()}
        assert held.keys() == names and ("lm_head.weight" in names) != SHAPES[shape].tied
        for module, suffix in plan.parameters():
            name = f"{module}.{suffix}"
            mine = checkpoint.read(name, plan.slice(module, suffix, rank)).to(getattr(torch, dtype))
            mine = make_weight(mine, plan.format_of(module)) if suffix == "weight" else mine
            assert equal(held[name], mine), (rank, name)
        read += plan.weight_bytes(rank)
        assert shards.bytes_read == read == sum(f.nbytes for r in range(rank + 1) for f in shards.files[r].values())


@pytest.mark.parametrize(("wanted", "fits"), [("data", True), ("auto", True), ("tensor", False)])
def test_a_encoder_that_every_rank_holds_whole(tmp_path, wanted, fits):
    """What ranks hold is the same for data and auto; one rank holds everything whichever it is."""
    plan, _, directory = written(tmp_path, "uneven", 2, "float32", "dense", "auto")
    whole = checked_plan(tmp_path / "model", 1, "float32")[1]
    if not fits:
        message = complaint(directory, vision=wanted)
        assert "tensor_parallel.vision data, the config's is tensor, its default" in message, message
        return
    name = "visual.blocks.0.attn.qkv.weight"
    held = opened(directory, replace(plan, vision=wanted)).load(1)[name]
    assert equal(held, whole.read(name, replace(plan, tp_size=1).slice(*name.rsplit(".", 1), 0)))
    one = tmp_path / "one"
    write_shards(*checked_plan(tmp_path / "model", 1, "float32", "data"), one)
    assert make_plan(one, 1, "float32", "tensor")[2] == make_plan(one, 1, "float32", "data")[2] == []


@pytest.mark.parametrize(("shape", "tp", "form", "dtype"), CASES[::5] + CASES[-3:])
def test_parts_put_together_are_the_tensors(tmp_path, shape, tp, form, dtype):
    """Through the safetensors package; quantised ones unpacked, each group as the quantised whole has it."""
    plan, checkpoint, directory = written(tmp_path, shape, tp, dtype, form)
    shards = opened(directory, plan)
    whole = replace(plan, tp_size=1)
    for module, suffix in plan.parameters():
        tensor = checkpoint.read(f"{module}.{suffix}", whole.slice(module, suffix, 0)).to(getattr(torch, dtype))
        tensor = make_weight(tensor, plan.format_of(module)) if suffix == "weight" else tensor
        tensor = tensor.dense() if isinstance(tensor, Quantised) else tensor
        assert equal(read_whole(shards, f"{module}.{suffix}"), tensor), (module, suffix)


@pytest.mark.parametrize(("shape", "tp", "form", "dtype"), [CASES[0], CASES[-1]])
def test_a_file_is_mapped_and_what_lies_askew_in_it_is_copied(tmp_path, shape, tp, form, dtype):
    plan, _, directory = written(tmp_path, shape, tp, dtype, form)
    shards = opened(directory, plan)
    file, infos = shards.file(tp - 1), shards.files[tp - 1]
    assert infos[next(entries(plan, tp - 1)).name].offset % 64 == 0
    held = shards.load(tp - 1)
    stored = {k: t for name, w in held.items() for k, t in (
        ((f"{name}.codes", w.codes), (f"{name}.scales", w.scales)) if isinstance(w, Quantised) else ((name, w),))}
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    low, high = (int(x, 16) for x in maps[0][0].split("-"))
    assert len(maps) == 1
    for name, tensor in stored.items():
        mapped = tensor.numel() > 0 and low <= tensor.data_ptr() < high
        assert mapped == (infos[name].offset % 64 == 0 and tensor.numel() > 0), name
        assert tensor.data_ptr() % 16 == 0, name
    assert shards.bytes_read == sum(info.nbytes for info in infos.values())


def test_a_file_that_became_shorter_since_it_was_looked_at(tmp_path):
    plan, _, directory = written(tmp_path, *CASES[0][:2], CASES[0][3], CASES[0][2])
    shards = opened(directory, plan)
    os.truncate(shards.file(0), shards.file(0).stat().st_size - 4)
    with pytest.raises(UserError, match="it was truncated while it was being read"):
        shards.load(0)
    os.truncate(shards.file(0), 0)
    with pytest.raises(UserError, match="cannot be mapped"):
        shards.load(0)


@pytest.mark.parametrize(("shape", "tp", "form", "dtype"), [CASES[0], *CASES[-2:]])
def test_safetensors_reads_the_files(tmp_path, shape, tp, form, dtype):
    """Every tensor lies at a multiple of its item's size, which is what readers that map files count on."""
    plan, _, directory = written(tmp_path, shape, tp, dtype, form)
    shards = opened(directory, plan)
    for rank in range(tp):
        with safe_open(shards.file(rank), "pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                e.name: e.shape for e in entries(plan, rank)}
        assert all(i.offset % sharded.BYTES[i.dtype] == 0 for i in shards.files[rank].values())


def test_the_directory_is_a_model_directory(tmp_path):
    plan, checkpoint = original(tmp_path)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_text(f"{{\"{name}\": 1}}")
    (tmp_path / "model" / "modeling_evil.py").write_text("raise SystemExit")
    manifest = write_shards(plan, checkpoint, tmp_path / "shards")
    names = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
             "preprocessor_config.json", MANIFEST, "rank-00-of-02.safetensors", "rank-01-of-02.safetensors"}
    assert {f.name for f in (tmp_path / "shards").iterdir()} == names
    for name in names - {MANIFEST} - {f.name for f in manifest.files}:
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    for file in manifest.files:
        path = tmp_path / "shards" / file.name
        sums = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert sums.stdout.split()[0] == file.sha256


# All of it or nothing

def left(directory: Path) -> list[str]:
    return sorted(f.name for f in directory.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
    plan, checkpoint = original(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    for name, words in (("full", "not an empty directory"), ("file", "not an empty directory"),
                        ("gone/below", "there is no directory"), ("link", "there is no directory")):
        with pytest.raises(UserError, match=words):
            write_shards(plan, checkpoint, tmp_path / name)
    assert left(tmp_path) == ["file", "full", "link", "model"] and left(tmp_path / "full") == ["thesis.txt"]


def test_an_empty_directory_is_filled_through_a_link_too(tmp_path):
    plan, checkpoint = original(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_shards(plan, checkpoint, tmp_path / "link")
    assert opened(tmp_path / "empty", plan).problems == [] and left(tmp_path) == ["empty", "link", "model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), UserError("ends at byte 9"), OSError(5, "io")])
def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch, error):
    plan, checkpoint = original(tmp_path)
    read, seen = checkpoint.read, []

    def fail(name, part):
        seen.append(left(tmp_path))
        if len(seen) == 30:
            raise error
        return read(name, part)

    monkeypatch.setattr(checkpoint, "read", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_shards(plan, checkpoint, tmp_path / "shards")
    assert seen[-1] == [".shards.partial", "model"] and left(tmp_path) == ["model"]


def test_a_file_that_cannot_grow_is_reported_and_leaves_nothing(tmp_path):
    plan, checkpoint = original(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))
    try:
        with pytest.raises(UserError, match=r"shards: cannot be written: File too large"):
            write_shards(plan, checkpoint, tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == ["model"]


def test_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    plan, checkpoint = original(tmp_path)
    monkeypatch.setattr(shard.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 20_000))
    with pytest.raises(UserError, match=r"0\.\d\d GB are needed, 0\.00 GB are free"):
        write_shards(plan, checkpoint, tmp_path / "shards")
    assert checkpoint.bytes_read == 0 and left(tmp_path) == ["model"]


def test_two_runs_do_not_write_one_directory(tmp_path):
    plan, checkpoint = original(tmp_path)
    (tmp_path / ".shards.partial").mkdir()
    other = os.open(tmp_path / ".shards.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is writing it"):
        write_shards(plan, checkpoint, tmp_path / "shards")
    os.close(other)
    write_shards(plan, checkpoint, tmp_path / "shards")
    assert left(tmp_path) == ["model", "shards"]


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("big") / "model"
    make_checkpoint(directory, BIG)
    (directory.parent / "c.yaml").write_text(
        "{model: {path: model, dtype: float32}, tensor_parallel: {tp_size: 2}, weights: {format: int8}}")
    return directory.parent


def run(big: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "launch" / "shard.py", "--config", big / "c.yaml", "--out", out, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(big: Path, out: Path, number: int) -> tuple[int, str]:
    job, deadline = run(big, out), time.monotonic() + 60
    while not list(out.parent.glob(".*.partial/rank-*")):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()
        time.sleep(0.002)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert not out.exists(), "it was faster than the signal: a larger model is needed"
    return job.returncode, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing(big, tmp_path, number, code):
    got, err = stopped(big, tmp_path / "out", number)
    assert got == code and "Traceback" not in err, err
    assert left(tmp_path) == []


def test_what_a_killed_command_left_goes_with_the_next(big, tmp_path):
    assert stopped(big, tmp_path / "out", signal.SIGKILL)[0] == -signal.SIGKILL
    assert left(tmp_path) == [".out.partial"]
    job = run(big, tmp_path / "out")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and "removing" in err, err
    assert left(tmp_path) == ["out"]
    row = json.loads(out.splitlines()[-1])
    assert row["summary"] and row["tp_size"] == 2 and row["format"] == "int8"
    assert [f["bytes"] for f in row["files"]] == [f.stat().st_size for f in sorted((tmp_path / "out").glob("rank-*"))]


def test_writing_holds_one_tensor_at_a_time(big, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from adapter.planning.load import checked_plan
from adapter.commands.shard import write_shards
import torch, adapter.kernels.linear
peak = lambda: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
plan, checkpoint = checked_plan(Path({str(big / 'model')!r}), 1, "float32")
before = peak()
write_shards(plan, checkpoint, Path({str(tmp_path / 'out')!r}))
print(peak() - before)
"""
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves, and no heap keeps it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
                          env=at_once)
    assert done.returncode == 0, done.stderr
    largest = 4 * BIG.mlp * BIG.hidden
    whole = sum(f.stat().st_size for f in (tmp_path / "out").glob("rank-*"))
    assert whole > 200e6 and int(done.stdout) < 1.5 * largest + (4 << 20), (int(done.stdout), largest, whole)
