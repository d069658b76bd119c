"""Plans of the published checkpoints from headers alone, the plan command and its exit codes, and the configs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import Shape, make_checkpoint
from published import FILES, PUBLISHED, TOTAL_BYTES, write_sparse

from adapter.commands.plan import report
from adapter.config.load import load_config
from adapter.planning.load import checked_plan, make_plan
from adapter.planning.plan import sizes_in_words, valid_tp_sizes
from policies.errors import UserError
from policies.families.qwen2_vl import POLICY
from policies.heads import split_heads

ROOT = Path(__file__).parents[2]
CONFIGS = {"2b": "qwen2_vl_2b_tp2.yaml", "7b": "qwen2_vl_7b_tp4.yaml", "72b": "qwen2_vl_72b_tp8.yaml"}
EVERY_SIZE = [(name, tp) for name in PUBLISHED for tp in (1, 2, 3, 4, 5, 6, 8)] + [("7b", 28)]
IO = Path("/proc/self/io")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Size ("7b") -> a directory as published, every tensor a hole."""
    home = tmp_path_factory.mktemp("published")
    return {name: write_sparse(home / name, shape, FILES[name]) for name, shape in PUBLISHED.items()}


def replicas(shape: Shape, tp: int) -> int:
    """Elements held more than once, written down on its own: what every rank holds whole, and KV heads held twice."""
    v = shape.v_heads * shape.v_head_dim
    whole = (2 * shape.layers + 1) * shape.hidden + v * 3 * 2 * 14 * 14
    whole += shape.v_layers * (2 * 2 * v + 2 * v) + 2 * v + shape.hidden  # norms; biases of attn.proj, fc2 and mlp.2
    held = sum(s.kv[1] - s.kv[0] for s in split_heads(shape.heads, shape.kv_heads, shape.head_dim, tp))
    kv_head = shape.layers * 2 * shape.head_dim * (shape.hidden + 1)
    return whole * (tp - 1) + kv_head * (held - shape.kv_heads)


def run_plan(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("name", "tp"), EVERY_SIZE)
def test_published_geometries_are_shared_out_whole(directories, name, tp):
    shape = PUBLISHED[name]
    plan, checkpoint = checked_plan(directories[name], tp, "bfloat16")
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == TOTAL_BYTES[name]
    facts = report(plan, [])
    assert sum(r["weight_bytes"] for r in facts["ranks"]) == TOTAL_BYTES[name] + 2 * replicas(shape, tp)
    for key, total in (("q_heads", shape.heads), ("vision_heads", 16)):
        owned = [h for r in facts["ranks"] for h in range(*r[key])]
        assert owned == list(range(total))
        assert max(r[key][1] - r[key][0] for r in facts["ranks"]) == -(-total // tp)
    group = shape.heads // shape.kv_heads
    for r in facts["ranks"]:
        assert list(range(*r["kv_heads"])) == sorted({h // group for h in range(*r["q_heads"])})
        heads = r["kv_heads"][1] - r["kv_heads"][0]
        assert r["kv_bytes_per_token"] == 2 * shape.layers * heads * 128 * 2


@pytest.mark.parametrize(("name", "tp", "q", "kv", "vision"), [
    ("2b", 2, [6, 6], [1, 1], [8, 8]),
    ("2b", 4, [3] * 4, [1] * 4, [4] * 4),
    ("7b", 3, [9, 9, 10], [2, 2, 2], [5, 5, 6]),
    ("7b", 4, [7] * 4, [1] * 4, [4] * 4),
    ("7b", 8, [3, 4] * 4, [1] * 8, [2] * 8),
    ("72b", 8, [8] * 8, [1] * 8, [2] * 8),
])
def test_known_heads(directories, name, tp, q, kv, vision):
    ranks = report(*make_plan(directories[name], tp, "bfloat16")[::2])["ranks"]
    for key, expected in (("q_heads", q), ("kv_heads", kv), ("vision_heads", vision)):
        assert [b - a for a, b in (r[key] for r in ranks)] == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_rank_is_much_fuller_than_the_others(directories, name):
    tp = load_config(ROOT / "configs" / CONFIGS[name], [f"model.path={directories[name]}"]).tensor_parallel.tp_size
    plan, _ = checked_plan(directories[name], tp, "bfloat16")
    assert max(map(plan.weight_bytes, range(tp))) < 1.03 * TOTAL_BYTES[name] / tp


def test_bytes_follow_the_dtype(directories):
    half, full = (make_plan(directories["7b"], 4, dtype)[0] for dtype in ("bfloat16", "float32"))
    assert full.weight_bytes(1) == 2 * half.weight_bytes(1)
    assert full.kv_bytes_per_token(1) == 2 * half.kv_bytes_per_token(1)


def test_a_rank_without_kv_heads_does_not_exist(directories):
    ranks = report(*make_plan(directories["7b"], 28, "bfloat16")[::2])["ranks"]
    assert {r["kv_heads"][1] - r["kv_heads"][0] for r in ranks} == {1}
    assert [r["vision_heads"][1] - r["vision_heads"][0] for r in ranks].count(0) == 12


def test_collectives(directories):
    plan = make_plan(directories["7b"], 4, "bfloat16")[0]
    assert plan.collectives() == {
        "per_layer": {"model.layers": 2, "visual.blocks": 2}, "per_token": 58,
        "per_token_bytes": 57 * 3584 * 2 + 152064 * 2, "per_token_all_reduce_bytes": 57 * 3584 * 2,
        "per_token_gathered_logits_bytes": 152064 * 2}
    alone = make_plan(directories["7b"], 1, "bfloat16")[0].collectives()
    assert (alone["per_token"], alone["per_token_bytes"]) == (0, 0)


def test_a_tied_head_is_counted_once(directories):
    names = [t["name"] for t in report(*make_plan(directories["2b"], 2, "bfloat16")[::2])["tensors"]]
    assert "lm_head.weight" not in names
    assert sorted(names) == sorted(PUBLISHED["2b"].tensors())


# Nothing but headers

@pytest.mark.skipif(not IO.exists(), reason="this system does not count the bytes a process reads")
def test_only_headers_are_read(directories, monkeypatch):
    """146.8 GB of holes: what the process reads is not much more than the headers, and no tensor is asked for."""
    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(os, "preadv", refuse)
    files = list(directories["72b"].iterdir())
    apparent, headers = sum(f.stat().st_size for f in files), sum(f.stat().st_blocks * 512 for f in files)
    assert apparent > TOTAL_BYTES["72b"] > 10_000 * headers

    def read_so_far() -> int:
        return int(re.search(r"rchar: (\d+)", IO.read_text())[1])

    before = read_so_far()
    plan, _ = checked_plan(directories["72b"], 8, "bfloat16")
    report(plan, [])
    assert read_so_far() - before < headers + len(files) * 256 * 1024


def test_planning_imports_neither_torch_nor_deepspeed(directories):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['plan.py', '--config', 'configs/{CONFIGS['72b']}', 'model.path={directories['72b']}', '--json']\n"
        "try:\n"
        "    runpy.run_path('launch/plan.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n"), done.stderr
    assert json.loads(done.stdout)["tp_size"] == 8


# The command

def test_json_has_what_the_contract_names(directories):
    done = run_plan("--config", f"configs/{CONFIGS['7b']}", f"model.path={directories['7b']}",
                    "tensor_parallel.tp_size=3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {"tp_size", "valid_tp_sizes", "problems", "ranks", "tensors", "collectives"} <= facts.keys()
    assert (facts["tp_size"], facts["valid_tp_sizes"], facts["problems"]) == (3, [*range(1, 29)], [])
    assert len(facts["ranks"]) == 3
    for row in facts["ranks"]:
        assert {"q_heads", "kv_heads", "vision_heads", "weight_bytes", "kv_bytes_per_token"} <= row.keys()
    assert {"per_layer", "per_token_bytes"} <= facts["collectives"].keys()
    assert {t["name"]: tuple(t["shape"]) for t in facts["tensors"]} == PUBLISHED["7b"].tensors()
    rows = {t["name"]: t for t in facts["tensors"]}
    q_proj = rows["model.layers.27.self_attn.q_proj.bias"]
    assert (q_proj["rule"], q_proj["dim"]) == ("Column", 0)
    assert q_proj["slices"] == [[[0, 1152]], [[1152, 2304]], [[2304, 3584]]]
    qkv = rows["visual.blocks.0.attn.qkv.weight"]
    assert qkv["slices"][1] == [[400, 800], [1680, 2080], [2960, 3360]]
    assert rows["visual.blocks.0.attn.proj.bias"]["dim"] is None
    assert rows["model.norm.weight"]["why"]


def test_the_table_is_short_and_without_words_of_the_machinery(directories):
    done = run_plan("--config", f"configs/{CONFIGS['7b']}", f"model.path={directories['7b']}")
    lines = done.stdout.splitlines()
    assert len(lines) == 4 + 4 and lines[1] == "tp sizes that work: 1 to 28", done.stdout
    assert not re.search(r"FLOP|0\.000 GB|auto|[{}]", done.stdout), done.stdout


def test_the_table_shows_every_row_of_the_policy_once(directories):
    done = run_plan("--config", f"configs/{CONFIGS['2b']}", f"model.path={directories['2b']}", "--tensors")
    assert done.returncode == 0, done.stderr
    shown = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    one_layer = replace(PUBLISHED["2b"], layers=1, v_layers=1)
    assert sorted(shown) == sorted(one_layer.tensors())
    assert "rank 1: query heads 6-11, KV heads 1-1, vision heads 8-15, weights 2.211 GB" in done.stdout


def broken_checkpoint(directory: Path) -> Path:
    """Three things wrong at once: KV heads, vision heads and a missing file."""
    make_checkpoint(directory, Shape(heads=12, kv_heads=4, layers=1, v_layers=1), files=2)
    config = json.loads((directory / "config.json").read_text())
    config["num_key_value_heads"], config["vision_config"]["num_heads"] = 5, 7
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model-00002-of-00002.safetensors").unlink()
    return directory


PROBLEMS = ["num_attention_heads 12 is not a multiple of num_key_value_heads 5",
            "embed_dim 64 is not a multiple of num_heads 7", "model-00002-of-00002.safetensors: missing",
            "tp_size 13: each rank needs a query head and there are 12"]


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_every_problem_at_once_and_exit_2(tmp_path, json_option):
    done = run_plan("--config", f"configs/{CONFIGS['2b']}", f"model.path={broken_checkpoint(tmp_path / 'm')}",
                    "tensor_parallel.tp_size=13", *json_option)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and all(p in done.stderr for p in PROBLEMS), done.stderr
    assert "tp sizes that would work: none" in done.stderr
    if json_option:
        facts = json.loads(done.stdout)
        assert all(any(p in found for found in facts["problems"]) for p in PROBLEMS)
        assert (facts["valid_tp_sizes"], facts["ranks"], facts["tensors"]) == ([], [], [])
    else:
        assert done.stdout == "", "there is no cut of which anything could be printed"


def test_a_sound_cut_of_a_broken_checkpoint_is_printed_and_its_problems_are_errors(tmp_path):
    make_checkpoint(tmp_path / "m", Shape(heads=12, kv_heads=4, layers=1, v_layers=1), files=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    done = run_plan("--config", f"configs/{CONFIGS['2b']}", f"model.path={tmp_path / 'm'}")
    assert done.returncode == 2 and "rank 1: query heads 6-11" in done.stdout and "missing" not in done.stdout
    problem = f"error: {tmp_path / 'm'}: model-00002-of-00002.safetensors: missing"
    assert done.stderr.startswith(problem) and "tp sizes" not in done.stderr, done.stderr


HANDWRITTEN = {key: value for key, value in PUBLISHED["72b"].config().items() if key != "max_position_embeddings"} | {
    "vision_config": {"hidden_size": 8192, "num_heads": 16}}
NOTED = ["max_position_embeddings (32768)", "vision_config.depth (32)", "vision_config.embed_dim (1280)",
         "vision_config.mlp_ratio (4)", "vision_config.in_chans (3)", "vision_config.patch_size (14)"]


def test_defaults_that_stand_in_for_what_config_json_does_not_state_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HANDWRITTEN))
    done = run_plan("--config", f"configs/{CONFIGS['72b']}", f"model.path={tmp_path}")
    note = next(line for line in done.stderr.splitlines() if "does not state" in line)
    assert done.returncode == 0 and note.startswith(f"note: {tmp_path}/config.json does not state "), done.stderr
    assert all(words in note for words in NOTED) and "num_heads" not in note and "tie_word" not in note, note


def test_a_published_config_brings_no_note(directories):
    done = run_plan("--config", f"configs/{CONFIGS['72b']}", f"model.path={directories['72b']}")
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_run_is_refused_with_every_problem_and_the_sizes_that_work(tmp_path):
    with pytest.raises(UserError) as caught:
        checked_plan(broken_checkpoint(tmp_path / "m"), 13, "bfloat16")
    assert all(p in str(caught.value) for p in PROBLEMS)
    assert "tp sizes that would work: none" in str(caught.value)


def test_a_tp_size_that_cannot_be_names_those_that_can(directories):
    with pytest.raises(UserError) as caught:
        checked_plan(directories["2b"], 13, "bfloat16")
    assert "tp_size 13" in str(caught.value)
    assert str(caught.value).endswith("tp sizes that would work: 1 to 12")


@pytest.mark.parametrize(("sizes", "words"), [
    ([*range(1, 29)], "1 to 28"), ([1, 2, 4], "1, 2, 4"), ([1, 2], "1, 2"), ([1], "1"), ([], "none")])
def test_sizes_in_words(sizes, words):
    assert sizes_in_words(sizes) == words


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "qwen9_vl"}'])
def test_nothing_to_plan_is_exit_2_and_a_message(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    done = run_plan("--config", f"configs/{CONFIGS['2b']}", f"model.path={tmp_path}", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "config.json" in done.stderr and "Traceback" not in done.stderr


def test_config_json_alone_is_enough_for_a_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["72b"].config()))
    done = run_plan("--config", f"configs/{CONFIGS['72b']}", f"model.path={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "planned from config.json alone" in done.stderr
    with pytest.raises(UserError) as caught:
        checked_plan(tmp_path, 8, "bfloat16")
    assert str(caught.value).startswith(f"{tmp_path}: no safetensors file here"), caught.value
    assert "put the checkpoint's safetensors files there" in str(caught.value) and "sizes" not in str(caught.value)
    with pytest.raises(UserError, match=r"(?s)cannot run at tp_size 99.*no safetensors.*tp_size 99.*work: 1 to 64"):
        checked_plan(tmp_path, 99, "bfloat16")


def test_a_model_with_little_to_share():
    """Dimensions smaller than tp_size are problems of their own, and the valid sizes leave them out."""
    geometry = POLICY.geometry(Shape(heads=12, kv_heads=4, mlp=5, vocab=9).config())
    assert valid_tp_sizes(POLICY, geometry) == [1, 2, 3, 4, 5]
    assert len(POLICY.problems(geometry, 10)) == 2


# The configs

PLANNED = sorted(file.name for file in (ROOT / "configs").glob("qwen2_vl_*.yaml"))


def test_there_are_configs_for_the_usual_counts_of_accelerators():
    usual = {"2b": (1, 2, 4), "7b": (1, 2, 4, 8), "72b": (4, 8, 16)}
    assert sorted(f"qwen2_vl_{name}_tp{tp}.yaml" for name, sizes in usual.items() for tp in sizes) == PLANNED


@pytest.mark.parametrize("file", PLANNED)
def test_the_config_of_each_published_size_plans(directories, file):
    name, count = re.fullmatch(r"qwen2_vl_(\w+)_tp(\d+)\.yaml", file).groups()
    path, tp = ROOT / "configs" / file, int(count)
    config = load_config(path, [f"model.path={directories[name]}"])
    assert (config.tensor_parallel.tp_size, config.model.dtype, len(config.requests)) == (tp, "bfloat16", 1)
    plan, _ = checked_plan(config.model.path, tp, config.model.dtype)
    text, vision = plan.heads["text"][0], plan.heads["vision"][0]
    low, high = (f"{f(map(plan.weight_bytes, range(tp))) / 1e9:.1f}" for f in (min, max))
    weights = low if low == high else f"{low} to {high}"
    says = ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in
                     ((text.owned, "query head"), (text.kv_heads, "KV head"), (vision.owned, "vision head")))
    assert f"has {says} and {weights} GB of weights." in path.read_text()
    assert f"any from 1 to {plan.geometry.attention['text'].q_heads} works" in path.read_text()
    assert all(f"qwenvl-tp {command} --config configs/{file}" in path.read_text() for command in ("plan", "generate"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_names_its_model_on_the_hub(name):
    config = load_config(ROOT / "configs" / CONFIGS[name], download=False)
    assert str(config.model.path) == f"Qwen/Qwen2-VL-{name.upper()}-Instruct"
