"""The nastiest of tests/unit/bad_input as jobs: two ranks, one message, exit 2, nothing left behind.

The last of them is found by rank 0 alone, when Transformers and DeepSpeed have been imported on both.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, launch

GENERATE = ROOT / "launch" / "generate.py"
DEMO = ROOT / "launch" / "demo" / "checkpoint"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
pytestmark = pytest.mark.ranks


def alter(file: str, **changes: object) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        stated = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(stated | changes))
    return apply


def fifo(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def dimensions(model: Path) -> None:
    raw = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [2**62] * 100_000
    encoded = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


CASES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {  # more YAML, a change of the checkpoint, words
    "a billion laughs": (f"{LAUGHS}generation: {{top_k: *a9}}\n", Path.exists, ["config.yaml", "aliases"]),
    "weights from a fifo": ("", fifo, ["model.safetensors", "not a regular file"]),
    "a shape of 100,000 dimensions": ("", dimensions, ["model.norm.weight", "header entry"]),
    "a billion layers": ("", alter("config.json", num_hidden_layers=10**9), ["num_hidden_layers", "1000000000"]),
    "no rotary sections": ("", alter("config.json", rope_scaling=None), ["mrope_section", "missing"]),
    "another image token": ("", alter("config.json", image_token_id=9), ["image_token_id is 9", "428"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_nastiest(tmp_path, case):
    yaml, change, words = CASES[case]
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    change(model)
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: {model}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n"
                    f"requests: [{{prompt: 'What colour is the shape?'}}]\n{yaml}")
    outcome = launch(2, GENERATE, "--config", str(file))
    assert outcome.code == 2, (outcome.code, outcome.err[-3000:])
    errors = [line for line in outcome.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in outcome.err, outcome.err[-3000:]
    assert all(word in outcome.err for word in words), (words, outcome.err[-3000:])
    assert not [line for line in outcome.out.splitlines() if line.startswith("{")], outcome.out


def test_a_start_names_the_defaults_that_stand_in_for_what_config_json_does_not_state(tmp_path):
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    vision = json.loads((model / "config.json").read_text())["vision_config"]
    assert vision.pop("num_heads") == 16, "the default, so that the model still runs"
    alter("config.json", vision_config=vision)(model)
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: model, dtype: float32}\ntensor_parallel: {tp_size: 2}\n"
                    "generation: {max_new_tokens: 2}\nrequests: [{prompt: 'What colour is the shape?'}]\n")
    outcome = launch(2, GENERATE, "--config", str(file))
    note = f"note: {model}/config.json does not state vision_config.num_heads (16); "
    assert outcome.code == 0 and outcome.err.count(note) == 1, outcome.err[-3000:]
    whole = launch(2, GENERATE, "--config", str(file), f"model.path={DEMO}")
    assert whole.code == 0 and "does not state" not in whole.err, whole.err[-3000:]
