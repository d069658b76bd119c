"""The arithmetic of the benchmark, its requests, its summary and its chart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from launching import ROOT
from published import FILES, PUBLISHED, write_sparse

from adapter.benchmark.calibrate import write_hardware
from adapter.benchmark.driver import binding, peer_record
from adapter.benchmark.limits import decode_bytes, prefill_flop, product
from adapter.benchmark.peers.peer import speed
from adapter.benchmark.request import PROMPT, as_line, first_request
from adapter.benchmark.summary import draw, spread, summary
from adapter.commands.subprocesses import Ended
from adapter.config.load import load_config
from adapter.planning.cost_model import Workload, predict
from adapter.planning.hardware import load_hardware
from adapter.planning.load import checked_plan
from adapter.requests.media import load_image

DEMO = str(ROOT / "configs" / "demo_tp4.yaml")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """(size, tp_size) -> the plan of a published checkpoint in bfloat16."""
    home = tmp_path_factory.mktemp("published")
    directories = {name: write_sparse(home / name, shape, FILES[name]) for name, shape in PUBLISHED.items()}
    return lambda name, tp: checked_plan(directories[name], tp, "bfloat16")[0]


def products(name: str) -> tuple[int, int, int, int]:
    """Weights that are multiplied by, written down on their own: text layers, head, vision blocks, merger."""
    s = PUBLISHED[name]
    kv, v = s.kv_heads * s.head_dim, s.v_heads * s.v_head_dim
    text = s.layers * (2 * s.hidden**2 + 2 * kv * s.hidden + 3 * s.mlp * s.hidden)
    vision = s.v_layers * (4 * v * v + 2 * 4 * v * v) + v * 3 * 2 * 14 * 14
    return text, s.vocab * s.hidden, vision, 4 * v * (4 * v + s.hidden)


@pytest.mark.parametrize("name", ["2b", "7b"])
def test_a_token_reads_the_text_encoder_and_the_head_once(plans, name):
    """The 2B ties its head to the embedding, the 7B does not; norms and biases are all that is beside the products."""
    s, (text, head, _, _) = PUBLISHED[name], products(name)
    small = s.layers * (2 * s.hidden + s.hidden + 2 * s.kv_heads * s.head_dim) + s.hidden
    assert decode_bytes(plans(name, 1), 0) == 2 * (text + head + small)
    assert sum(decode_bytes(plans(name, 2), rank) for rank in range(2)) == pytest.approx(2 * (text + head), rel=1e-3)


@pytest.mark.parametrize("name", ["2b", "7b"])
def test_a_prompt_multiplies_by_every_weight_once_a_row(plans, name):
    """An image of 448 x 448 is 1,024 patches, 256 of the prompt's 283 tokens. Attention is causal in the text."""
    s, (text, head, vision, merger) = PUBLISHED[name], products(name)
    expected = 2 * (283 * text + head + 1024 * vision + 256 * merger)
    expected += 4 * (s.v_layers * 1280 * 1024**2 + s.layers * s.hidden * 283 * 284 // 2)
    load = Workload(283, (1024,))
    assert prefill_flop(plans(name, 1), load, 0) == expected
    halves = [prefill_flop(plans(name, 2), load, rank) for rank in range(2)]
    patches = 2 * 1024 * 1280 * 3 * 2 * 14 * 14  # each rank embeds them
    assert sum(halves) == expected + patches


def test_assigning_images_does_not_move_the_limit(plans):
    load = Workload(283, (1024,))
    split, assigned = plans("2b", 2), replace(plans("2b", 2), vision="data")
    for rank in range(2):
        assert prefill_flop(assigned, load, rank) == prefill_flop(split, load, rank)
        assert decode_bytes(assigned, rank) == decode_bytes(split, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_that_is_timed_is_one(dtype):
    out = product(dtype)()
    assert out.shape == (1024, 5120) and out.dtype is dtype and bool((out == 1280).all())


def test_spread_of_numbers_lists_and_mappings():
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert spread([0.00074, 0.00076])["median"] == 0.00075  # of operators, some microseconds
    assert spread([[1, 5], [3, 4]]) == [{"min": 1, "median": 2, "max": 3}, {"min": 4, "median": 4.5, "max": 5}]
    assert spread([{"a": 1}, {"a": 3, "b": 7}]) == {"a": {"min": 1, "median": 2, "max": 3},
                                                    "b": {"min": 7, "median": 7, "max": 7}}


def test_summary_has_ours_on_top_and_the_peers_below():
    rows = [{"engine": "ours", "repeat": 0, "load_s": 2.0, "case": {"tp_size": 2}},
            {"engine": "ours", "repeat": 0, "ttft_s": 1.0}, {"engine": "ours", "repeat": 1, "ttft_s": 2.0},
            {"engine": "hf", "repeat": 0, "ttft_s": 4.0, "case": {"version": "5"}},
            {"engine": "vllm", "repeat": 0, "error": "exit code 1"}]
    found = summary(rows, 2)
    assert found["summary"] is True and found["tp_size"] == 2 and found["repeats"] == 2
    assert found["load_s"]["median"] == 2.0 and found["ttft_s"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert found["peers"] == {"hf": {"version": "5", "ttft_s": {"min": 4.0, "median": 4.0, "max": 4.0}},
                              "vllm": {"error": "exit code 1"}}


def test_a_peers_record_is_its_last_row_and_when_it_was_ready():
    rows = [(0.5, {"ready": True}), (2.0, {"ttft_s": 1.0})]
    assert peer_record(Ended(0, rows, [], 1.0)) == [{"start_s": 0.5, "ttft_s": 1.0}]


@pytest.mark.parametrize(("ranks", "cores", "expected"), [
    (1, 2, "0-1"), (2, 2, "0|1"), (4, 2, "0|1|0|1"), (2, 8, "0-3|4-7"), (3, 8, "0-1|2-3|4-5")])
def test_cores_of_each_rank(ranks, cores, expected):
    assert binding(ranks, cores) == expected


def test_speed_is_of_the_first_token_and_of_those_after_it():
    assert speed(10.0, [11.0, 11.5, 12.0]) == {"ttft_s": 1.0, "decode_tok_s": 2.0}


def test_a_config_without_requests_gets_a_drawn_image(tmp_path):
    config = load_config(ROOT / "configs" / "bench_2b.yaml", [f"model.path={tmp_path}"])
    request = first_request(config)
    assert config.requests == () and request.prompt == PROMPT
    image = load_image(request.images[0])
    assert image.size == (448, 448)
    assert image.getpixel((0, 0)) == (0, 0, 0) and image.getpixel((447, 0)) == (255, 0, 127)


@pytest.mark.parametrize("request_yaml", [
    "{prompt: What, images: [a.png], max_pixels: 50176, expected: red}",
    "{messages: [{role: user, content: [{type: image, image: a.png}, {type: text, text: What}]}]}",
    "{prompt: What, videos: [[a.png, b.png]]}"])
def test_a_request_survives_being_written_down(tmp_path, request_yaml):
    """As one line of a file that is in another directory, its expected answer aside."""
    (tmp_path / "c.yaml").write_text(f"model: {{path: .}}\nrequests: [{request_yaml}]\n")
    request = first_request(load_config(tmp_path / "c.yaml"))
    assert request.expected is None
    elsewhere = tmp_path / "sub" / "requests.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_text(as_line(request))
    assert load_config(tmp_path / "c.yaml", [f"requests={elsewhere}"]).requests == (request,)


def test_the_chart_is_a_png_with_every_engine_that_ran(tmp_path):
    from PIL import Image

    figure = {"min": 1.0, "median": 2.0, "max": 3.0}
    ours = {"decode_tok_s": figure, "ttft_s": figure, "limit_decode_tok_s": figure, "limit_ttft_s": figure}
    facts = {"prompt_tokens": 283, "new_tokens": 32, "dtype": "bfloat16", "tp_size": 2, "device": "cpu", "repeats": 3}
    heights = []
    for peers in ({}, {"hf": ours}, {"hf": ours, "vllm": {"error": "exit code 1"}}):
        draw({**facts, **ours, "peers": peers}, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as chart:
            assert chart.format == "PNG"
            heights.append(chart.height)
    assert heights[0] < heights[1] == heights[2], "an engine that failed has no bar"


@pytest.mark.parametrize("tp", [1, 2])
def test_a_prediction_with_the_written_machine_repeats_the_measurement(plans, tp, tmp_path):
    """Figures of about the size of two cores'. Attention and linears are not told apart, the sum of both is."""
    def of_ranks(value: float) -> list[dict[str, float]]:
        return [{"median": value}] * tp

    plan, load = plans("2b", tp), Workload(283, (1024,), 32)
    found = {
        "machine": "a machine", "device": "cpu", "devices": 2, "threads": 2 // tp, "memory_bytes": 24 << 30,
        "prompt_tokens": 283, "patches": [1024], "new_tokens": 32, "dtype": "bfloat16", "format": "dense",
        "tp_size": tp, "repeats": 3, "decode_tok_s": {"median": 9.5}, "ttft_s": {"median": 7.9},
        "read_gb_s": of_ranks(38.0 / tp), "matmul_gflop_s": of_ranks(820.0 / tp), "pss_bytes": of_ranks(5e9),
        "weight_bytes": [plan.weight_bytes(rank) for rank in range(tp)],
        "collective_us": {"all_reduce_decode": {"median": 3.0}, "all_reduce_prefill": {"median": 230.0}},
    }
    write_hardware(plan, found, tmp_path / "machine.yaml")
    machine = load_hardware(tmp_path / "machine.yaml")
    foreseen = predict(plan, machine, load)
    assert foreseen.decode_tok_s == pytest.approx(9.5, rel=1e-3)
    assert foreseen.ttft_s == pytest.approx(7.9, rel=1e-3)
    assert machine.memory_read_gb_s == 38 and machine.matmul_tflop_s == {"bfloat16": 0.41}
    assert 0 < machine.efficiency.matmul < 1
    if tp == 2:
        one = machine.collective(2)
        assert one.latency_us == pytest.approx(2.2, abs=0.05)
        assert machine.collective_s(2, 1, 869376) == pytest.approx(230e-6, rel=1e-3)


def bench(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "launch/bench.py", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, env={**os.environ, **(env or {})}, check=False)


@pytest.mark.parametrize(("args", "words"), [
    (["--against", "hf,vlm"], ["'vlm'", "hf, hf-tp, deepspeed, vllm"]),
    (["--against", "vllm"], ["--vllm-python"]),
    (["--against", "vllm", "--vllm-python", "/no/such/python"], ["/no/such/python", "no such program"]),
    (["--against", "deepspeed", "tensor_parallel.tp_size=7"], ["injection_policy", "4"]),
    (["--new", "1"], ["--new", "'1'", "from 2"]), (["--repeats", "0"], ["--repeats", "'0'"]),
    (["--requests-at-once", "many"], ["--requests-at-once", "'many'"]),
    (["--write-hardware", "/no/such/place/a.yaml"], ["--write-hardware", "/no/such/place/a.yaml", "cannot be written"]),
    (["--png", "/no/such/place/a.png"], ["--png", "/no/such/place/a.png", "cannot be written"]),
    (["tensor_parallel.tp_size=29"], ["tp_size 29", "28"]), (["batchsize=3"], ["batchsize", "batch_size"]),
])
def test_bad_arguments_are_said_and_nothing_is_started(args, words):
    done = bench("--config", DEMO, *args)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and "repeat 1" not in done.stderr


def test_peers_need_the_cores_that_ranks_hold():
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = bench("--config", DEMO, "--against", "hf", "tensor_parallel.tp_size=1", env=env)
    assert done.returncode == 2 and "python launch/bench.py --against hf" in done.stderr, done.stderr


def test_the_driver_imports_neither_torch_nor_deepspeed():
    """It waits while jobs run: what it had mapped, ranks would share, and their memory would look smaller."""
    code = ("import json, sys; from adapter.benchmark import main; from adapter.config.load import load_config;"
            f"from adapter.benchmark.request import first_request; first_request(load_config({DEMO!r}));"
            "print(json.dumps([name for name in ('torch', 'deepspeed') if name in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=True)
    assert json.loads(done.stdout) == []
