"""launch/verify.py as its users run it: exit codes, the JSON contract, the report; bfloat16 and the oldest releases."""

from __future__ import annotations

import json
import os
from functools import cache

import pytest
from launching import ROOT, launch

VERIFY = ROOT / "launch" / "verify.py"
CONFIG = str(ROOT / "configs" / "demo_tp4.yaml")
PICTURES = ROOT / "launch" / "demo" / "pictures"
OLD = os.environ.get("QWENVL_TP_OLD_PYTHON", "")
pytestmark = pytest.mark.ranks


def run(ranks: int, *overrides: str, **options):
    outcome = launch(ranks, VERIFY, "--config", CONFIG, f"tensor_parallel.tp_size={ranks}", *overrides, **options)
    return outcome, [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]


@cache
def demo_over_three_ranks(directory):
    """28/4 heads over three ranks, so that one straddles two KV groups; a picture, a pair and a clip."""
    names = {p.name: p for p in sorted(PICTURES.iterdir())}
    clip = next(p for n, p in names.items() if n.endswith(".mp4"))
    one, two, *_ = (p for n, p in names.items() if n.endswith(".png"))
    asked = [("one", "What colour is the shape?", "images", [one]),
             ("two", "Are there more shapes in the first or the second picture?", "images", [one, two]),
             ("clip", "In which direction does the shape move?", "videos", [clip])]
    requests = "requests=" + json.dumps([{"id": i, "prompt": p, kind: list(map(str, m))} for i, p, kind, m in asked])
    return run(3, requests, "--report", str(directory / "report.html"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return *demo_over_three_ranks(directory), directory / "report.html"


def test_the_demo_holds(demo):
    outcome, rows, _ = demo
    assert outcome.code == 0, outcome.err[-3000:]
    assert [r.get("id") for r in rows] == ["one", "two", "clip", "padded batch", None]
    for row in rows[:-1]:
        assert row["passed"] and row["first_divergent_module"] is None and row["ranks_agree"]
        assert row["greedy_match"]["equal"] == row["greedy_match"]["of"] > 0
        assert 0 < row["mean_abs_logit_diff"] <= row["max_abs_logit_diff"] <= 1e-4
        assert 0 < row["largest_share_of_bound"] < 0.5, "the bounds are not idle"
        assert row["answer"] == row["one_process_answer"]


@pytest.mark.parametrize("vision", [pytest.param(vision, marks=pytest.mark.sweep) for vision in ("data", "auto")])
def test_whole_encoders_hold(vision):
    """Three ranks: two of them without a picture, one of them, and each with a frame of a clip or two."""
    named = sorted(PICTURES.iterdir())
    clip, (one, two, *_) = next(p for p in named if p.suffix == ".mp4"), [p for p in named if p.suffix == ".png"]
    asked = [("one", "images", [one]), ("two", "images", [one, two]), ("clip", "videos", [clip])]
    outcome, rows = run(3, f"tensor_parallel.vision={vision}", "generation.max_new_tokens=3", "requests=" + json.dumps(
        [{"id": i, "prompt": "What is in it?", kind: list(map(str, m))} for i, kind, m in asked]))
    assert outcome.code == 0, outcome.err[-3000:]
    assert [r.get("id") for r in rows] == ["one", "two", "clip", "padded batch", None] and rows[-1]["passed"]
    for row in rows[:-1]:
        assert row["first_divergent_module"] is None and 0 < row["largest_share_of_bound"] < 0.5
        encoder = [layer for layer in row["layers"] if layer["name"].startswith("visual.")]
        assert len(encoder) == 3 * len(row["encoder_calls"]) and all(layer["error"] < 1e-6 for layer in encoder)
        if "tensor" in row["encoder_calls"]:  # the others are one process's arithmetic: no error at all
            assert all(layer["share_of_bound"] > 0 for layer in encoder)
    ways = [way for row in rows[:-1] for way in row["encoder_calls"]]
    assert len(ways) == 5 and (set(ways) == {"data"} if vision == "data" else ways[0] == "tensor" and "data" in ways)
    assert rows[-1]["reassembly"]["equal"] and rows[-1]["unchecked"] == []
    assert rows[-1]["reassembly"]["bytes"] == sum(r["weight_bytes"] for r in rows[-1]["ranks"])


def test_every_layer_of_both_encoders_is_checked(demo):
    _, rows, _ = demo
    plan_layers = [f"visual.blocks.{i}" for i in range(3)] + [f"model.layers.{i}" for i in range(4)]
    assert [layer["name"] for layer in rows[0]["layers"]] == plan_layers
    assert all(layer["share_of_bound"] > 0 and layer["error"] > 0 for layer in rows[0]["layers"])
    assert rows[0]["modules_checked"] > 100


def test_the_summary_keeps_the_contract(demo):
    _, rows, _ = demo
    summary = rows[-1]
    assert summary["summary"] and summary["passed"] and summary["tp_size"] == 3 and summary["dtype"] == "float32"
    assert summary["reassembly"]["equal"] and summary["reassembly"]["tensors"] == 94
    assert summary["reassembly"]["bytes"] == sum(r["weight_bytes"] for r in summary["ranks"])
    assert {"max_abs_logit_diff", "greedy_match", "first_divergent_module", "bound", "versions"} <= summary.keys()


def test_the_report_is_written(demo):
    *_, report = demo
    page = report.read_text()
    assert page.count("data:image/") >= 4 and "<svg" in page and "padded batch" in page and "http" not in page.split(
        "<svg")[0]


def test_bfloat16_holds_within_the_derived_bound():
    request = f"requests=[{{prompt: hello, images: [{next(PICTURES.glob('*.png'))}]}}]"
    outcome, rows = run(2, request, "--dtype", "bfloat16", "generation.max_new_tokens=3")
    assert outcome.code == 0, outcome.err[-3000:]
    assert rows[0]["max_abs_logit_diff"] > 1e-3, "bfloat16 does round"
    assert 0.05 < rows[0]["largest_share_of_bound"] <= 1


def test_a_request_that_cannot_be_prepared_is_exit_2_and_the_others_are_checked(tmp_path):
    """Texts of unlike length too, padded: no picture says where positions begin."""
    asked = [("gone", "hello", ["/nowhere.png"]), ("text", "hello", []), ("long", "hello " * 60, [])]
    requests = "requests=" + json.dumps([{"id": i, "prompt": p, "images": m} for i, p, m in asked])
    outcome, rows = run(2, requests, "--report", str(tmp_path / "report.html"))
    assert outcome.code == 2 and "/nowhere.png" in rows[0]["error"], outcome.err[-3000:]
    assert [r["id"] for r in rows[1:-1] if r["passed"]] == ["text", "long", "padded batch"]
    assert not rows[-1]["passed"] and (tmp_path / "report.html").exists()
    assert "visual.patch_embed.proj" in rows[-1]["unchecked"] and "with an image" in outcome.err


def test_one_rank_holds():
    outcome, rows = run(1, f"requests=[{{prompt: hello, images: [{next(PICTURES.glob('*.png'))}]}}]", launcher="alone")
    assert outcome.code == 0 and rows[0]["passed"], outcome.err[-3000:]


def test_a_report_that_cannot_be_written_is_reported_before_the_run():
    outcome, rows = run(1, "--report", "/nowhere/report.html", launcher="alone")
    assert outcome.code == 2 and "/nowhere/report.html" in outcome.err and not rows


@pytest.mark.long
@pytest.mark.skipif(not OLD, reason="QWENVL_TP_OLD_PYTHON is not set")
@pytest.mark.parametrize("vision", ["tensor", "data"])
def test_the_oldest_releases_hold_with_eager_attention(vision):
    pictures = ", ".join(map(str, sorted(PICTURES.glob("*.png"))[:2]))
    request = f"requests=[{{prompt: hello, images: [{pictures}]}}]"
    outcome, rows = run(2, request, "model.attn_implementation=eager", f"tensor_parallel.vision={vision}", python=OLD)
    assert outcome.code == 0 and rows[0]["passed"] and rows[0]["modules_checked"] > 100, outcome.err[-3000:]
