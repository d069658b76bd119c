"""verify on quantised files over two ranks: sound ones hold, and a reader that is wrong is named by its module."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from families import make_whole
from launching import ROOT, launch
from planted_quantised import QUANTISED_FAULTS
from quantised import KINDS, quantised

WORKER = Path(__file__).with_name("fault_worker.py")
FORMS = ["awq", pytest.param("gptq4", marks=pytest.mark.sweep), pytest.param("fp8", marks=pytest.mark.sweep)]
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    make_whole(root / "dense", "qwen2_5_vl", intermediate_size=208, num_hidden_layers=2)
    return root


@cache
def written(root: Path, form: str) -> Path:
    """A config for quantised files."""
    directory, config = quantised(root / "dense", root / form, KINDS[form]), root / f"{form}.yaml"
    config.write_text(f"model: {{path: {directory}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n")
    return config


@cache
def outcomes(root: Path, form: str, dtype: str = "float32") -> dict[str, dict]:
    outcome = launch(2, WORKER, str(written(root, form)), dtype, "", QUANTISED_FAULTS[form][0], timeout=400)
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"fault"')]
    return {row["fault"]: row for row in rows}


@pytest.mark.parametrize("form", FORMS)
def test_sound_files_hold(home, form):
    row = outcomes(home, form)[""]
    assert row["passed"] and row["at_start"] == "held", row["summary"]["problems"]
    assert row["case"]["first_divergent_module"] is None and row["summary"]["reassembly"]["equal"]
    assert row["case"]["greedy_match"] == {"equal": 2, "of": 2} and row["case"]["largest_share_of_bound"] < 0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_reader_is_named(home, form):
    name, fault = QUANTISED_FAULTS[form]
    row = outcomes(home, form)[name]
    assert not row["passed"] and row["case"]["first_divergent_module"]["module"] == fault.module
    assert {d["tensor"] for d in row["summary"]["reassembly"]["differing"]} == {f"{fault.module}.weight"}


@pytest.mark.sweep
@pytest.mark.parametrize("form", QUANTISED_FAULTS)
def test_bfloat16(home, form):
    """Weights are rounded once, from float32, on both sides."""
    rows = outcomes(home, form, "bfloat16")
    assert rows[""]["passed"] and rows[""]["at_start"] == "held", rows[""]["summary"]["problems"]
    assert not rows[QUANTISED_FAULTS[form][0]]["passed"]


def test_answers_of_two_ranks_are_those_of_one_process(home):
    """launch/one_process.py gives Transformers the decoded weights, which it could not read itself without a GPU."""
    colours = next((ROOT / "launch" / "demo" / "pictures").glob("*colour*"))
    asked = ("--config", str(written(home, "awq")), "generation.max_new_tokens=8", "generation.do_sample=false",
             f"requests=[{{id: one, prompt: 'What colour is the shape?', images: [{colours}]}}]")
    ranks = launch(2, ROOT / "launch" / "generate.py", *asked)
    alone = launch(1, ROOT / "launch" / "one_process.py", *asked, launcher="alone")
    rows = [json.loads(o.out.splitlines()[0]) for o in (ranks, alone) if not o.code] or [ranks.err + alone.err]
    assert "note: the files are quantised (AWQ, 4 bits, groups of 16)" in ranks.err
    assert len(rows) == 2 and rows[0]["tokens"] == rows[1]["tokens"] and len(rows[0]["tokens"]) > 1, rows


def test_hosts_that_would_read_the_same_codes_otherwise(home):
    """Zeros of version 1 on one, of version 2 on the other: nothing else is unlike."""
    directory = quantised(home / "dense", home / "unlike", KINDS["gptq4"])
    other = shutil.copytree(directory, home / "unlike-other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (other / "config.json").write_text(json.dumps(config))
    outcome = launch(2, ROOT / "tests" / "faults" / "unlike_worker.py", "files", str(directory))
    assert outcome.code == 2 and "the ranks of this job are not alike" in outcome.err, outcome.err[-3000:]
    assert "quantization_config: Gptq(" in outcome.err and "Traceback" not in outcome.err, outcome.err[-3000:]
