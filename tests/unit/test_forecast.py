"""Hardware files, and `launch/plan.py --hardware`: its options and what it prints."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from published import FILES, PUBLISHED, TOTAL_BYTES, write_sparse
from test_predict import LOAD, PLAIN, TINY, hardware, plan_of

from adapter.commands.forecast import add_options, workload
from adapter.planning.cost_model import Workload, predict, predict_all
from adapter.planning.hardware import load_hardware
from policies.errors import UserError
from policies.families.qwen2_vl import POLICY

ROOT = Path(__file__).parents[2]
FILES_OF_HARDWARE = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))
CONFIGS = {"2b": "qwen2_vl_2b_tp2.yaml", "7b": "qwen2_vl_7b_tp4.yaml", "72b": "qwen2_vl_72b_tp8.yaml"}


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "h.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("file", FILES_OF_HARDWARE, ids=lambda f: f.stem)
def test_a_file_survives_being_written_again(tmp_path, file):
    read = load_hardware(file)
    assert load_hardware(write(tmp_path, read.model_dump(mode="json"))) == read
    assert len(read.source) > 40


def without(key: str) -> dict:
    return {k: v for k, v in PLAIN.items() if k != key}


@pytest.mark.parametrize(("content", "says"), [
    (without("memory_gb"), "memory_gb: missing"),
    (without("source"), "source: missing"),
    (PLAIN | {"memory_read_gb": 3}, "unknown key; did you mean 'memory_read_gb_s'"),
    (PLAIN | {"memory_gb": "80"}, "memory_gb = '80': a string; it should be a number"),
    (PLAIN | {"memory_gb": -1}, "memory_gb = -1"),
    (PLAIN | {"memory_read_gb_s": 0}, "memory_read_gb_s = 0"),
    (PLAIN | {"memory_read_gb_s": math.inf}, "memory_read_gb_s = inf"),
    (PLAIN | {"kind": "gpu"}, "kind = 'gpu': it should be 'accelerator' or 'cpu'"),
    (PLAIN | {"devices": 0}, "devices = 0"),
    (PLAIN | {"matmul_tflop_s": {"bf16": 1}}, "'bf16': it should be 'bfloat16', 'float16' or 'float32'"),
    (PLAIN | {"efficiency": {"matmul": 1.5, "attention": 1, "memory_read": 1}}, "efficiency.matmul = 1.5"),
    (PLAIN | {"all_reduce": [{"ranks": 1, "latency_us": 1, "bandwidth_gb_s": 1}]}, "all_reduce.0.ranks = 1"),
    ("", "is empty"), ("- 1", "holds a list"), ("a: [", "line 1"), ("name: !!python/object:os.system x", "could not"),
], ids=lambda value: value[:30] if isinstance(value, str) else "file")
def test_a_bad_file_is_a_message(tmp_path, content, says):
    with pytest.raises(UserError) as caught:
        load_hardware(write(tmp_path, content))
    assert says in str(caught.value) and "h.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_hardware(tmp_path / "none.yaml")


def test_what_a_file_lacks_is_asked_for_when_it_is_needed():
    no_ring = hardware(all_reduce=[])
    with pytest.raises(UserError, match="no all_reduce, which 2 ranks need"):
        predict(plan_of(TINY, 2), no_ring, LOAD)
    assert [p.tp_size for p in predict_all(plan_of(TINY, 1), no_ring, LOAD)] == [1]
    with pytest.raises(UserError, match=r"no matmul_tflop_s.float32.*known: bfloat16"):
        predict(plan_of(TINY, 1, "float32"), hardware(), LOAD)


# The options and the command

def load_of(*options: str) -> Workload:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return workload(POLICY.geometry(PUBLISHED["2b"].config()), parser.parse_args(options))


def test_the_default_workload():
    assert load_of() == Workload(283, (1024,), 32, 1)
    assert load_of("--image", "none", "--prompt-tokens", "5", "--new-tokens", "2", "--batch", "3") == Workload(
        5, (), 2, 3)
    two = load_of("--image", "28x56", "--image", "451x440")
    assert two.patches == (8, 1024) and two.prompt_tokens == 2 + 256 + 27


@pytest.mark.parametrize("options", [
    ["--image", "448"], ["--image", "0x448"], ["--image", "448x65537"], ["--image", "None"],
    ["--prompt-tokens", "0"], ["--new-tokens", "0"], ["--batch", "-1"]], ids=" ".join)
def test_an_option_that_cannot_be_is_a_message(options, capsys):
    with pytest.raises(SystemExit):
        load_of(*options)
    said = capsys.readouterr().err
    assert options[0] in said and options[1] in said and any(w in said for w in ("HEIGHTxWIDTH", "from 1", "expected"))


@pytest.mark.parametrize(("options", "says"), [
    (["--prompt-tokens", "256"], "images alone are 256 tokens"),
    (["--image", "none", "--prompt-tokens", "4090"], "context of 4096")])
def test_a_prompt_that_cannot_be_is_a_message(options, says):
    with pytest.raises(UserError, match=says):
        load_of(*options)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    home = tmp_path_factory.mktemp("published")
    return {name: write_sparse(home / name, shape, FILES[name]) for name, shape in PUBLISHED.items()}


def run_plan(directory: Path, name: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", "--config", f"configs/{CONFIGS[name]}", f"model.path={directory}"]
    return subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("file", FILES_OF_HARDWARE, ids=lambda f: f.stem)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_on_every_machine(directories, name, file):
    done = run_plan(directories[name], name, "--hardware", str(file), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    found, machine = facts["prediction"], load_hardware(file)
    assert [row["tp_size"] for row in found["by_tp_size"]] == facts["valid_tp_sizes"]
    assert found["workload"] == {"prompt_tokens": 283, "patches": [1024], "new_tokens": 32, "batch": 1}
    here = found["by_tp_size"][facts["tp_size"] - 1]
    assert {key: found[key] for key in here} == here
    assert found["memory"]["weights"] == facts["ranks"][found["memory"]["rank"]]["weight_bytes"]
    memory = [row["memory_bytes"] for row in found["by_tp_size"]]
    assert all(b < 1.02 * a for a, b in pairwise(memory)), "more ranks must not hold more each"
    alone = found["by_tp_size"][0]
    assert alone["memory_bytes"] - machine.process_memory_gb * 1e9 == pytest.approx(TOTAL_BYTES[name], rel=0.02)
    assert alone["fits"] == (alone["memory_bytes"] <= machine.memory_gb * 1e9)
    assert found["decode_tok_s"] > 0 and found["ttft_s"] > 0 and 0 < found["ttft_collectives"] < 1


def numbers(line: str) -> list[float]:
    """The numbers of a printed line, in seconds, bytes and counts as they stand; units of time as what they are."""
    factors = {"ms": 1e-3}
    return [float(number) * factors.get(unit, 1) for number, unit in re.findall(r"(\d[\d.]*)(?: (ms|s|GB))?\b", line)]


@pytest.mark.parametrize(("name", "file", "more"), [
    ("2b", "cpu_2_cores", ["tensor_parallel.tp_size=4", "--batch", "2"]), ("7b", "a100_80gb_x4", []),
    ("72b", "h100_80gb_x8", ["--image", "1008x1008", "--image", "448x448", "--prompt-tokens", "2000"]),
])
def test_the_tables_add_up_as_printed(directories, name, file, more):
    done = run_plan(directories[name], name, "--hardware", f"configs/hardware/{file}.yaml", *more)
    assert done.returncode == 0, done.stderr
    lines = done.stdout[done.stdout.index("prediction for"):].splitlines()
    for phase in ("vision", "prefill", "decode"):
        line = next(line for line in lines if line.split()[:1] == [phase])
        _, _, compute, _, reading, _, _, collectives, overhead, total = numbers(line)
        assert max(compute, reading) + collectives + overhead == pytest.approx(total, rel=1e-2), line
    for begin in ("time to first token", "memory of the fullest rank"):
        line = next(line for line in lines if line.startswith(begin)).split(":", 1)[1]
        *terms, whole = numbers(line)
        assert sum(terms) == pytest.approx(whole, rel=1e-2), line
    table = lines[next(n for n, line in enumerate(lines) if line.split()[:1] == ["tp_size"]) + 1:]
    sizes, machine = [int(line.split()[0]) for line in table], load_hardware(f"configs/hardware/{file}.yaml")
    assert sizes == [*range(1, machine.devices + 1), *([4] if name == "2b" else [])], "the plan's own is always there"
    figures = re.findall(r"\d+\.\d+", "\n".join(lines[5:]))
    assert all(len(figure.replace(".", "").lstrip("0")) <= 3 for figure in figures), "more than an estimate has"


def test_more_ranks_than_cards_do_not_fit(directories):
    done = run_plan(directories["7b"], "7b", "--hardware", "configs/hardware/a100_80gb_x4.yaml",
                    "tensor_parallel.tp_size=7")
    heading, *_, four, seven = done.stdout.splitlines()[-7:]
    assert "has 4 cards; more ranks would share them, which `generate` refuses" in heading, done.stdout
    assert four.endswith("yes") and seven.split()[0] == "7" and seven.endswith("too few cards"), done.stdout


def test_options_without_hardware_are_a_message(directories):
    done = run_plan(directories["2b"], "2b", "--batch", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: --batch" in done.stderr and "--hardware" in done.stderr and "Traceback" not in done.stderr


def test_a_bad_hardware_file_ends_the_command(directories, tmp_path):
    done = run_plan(directories["2b"], "2b", "--hardware", str(write(tmp_path, PLAIN | {"devises": 4})))
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'devices'" in done.stderr and "Traceback" not in done.stderr


def test_predicting_imports_neither_torch_nor_deepspeed(directories):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['plan.py', '--config', 'configs/{CONFIGS['72b']}', 'model.path={directories['72b']}', "
        "'--hardware', 'configs/hardware/h100_80gb_x8.yaml']\n"
        "try:\n"
        "    runpy.run_path('launch/plan.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n"), done.stderr
