"""Three lines changed in a script that knows nothing of this project: it runs split, and answers as one process."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import pytest
from launching import ROOT, Job, Outcome, launch

STOCK = Path(__file__).with_name("stock_script.py")
DEMO = ROOT / "launch" / "demo"
ARGUMENTS = ("--name", str(DEMO / "checkpoint"), "--pictures", str(DEMO / "pictures"))
RIGHT = ["purple", "cross", "bottom left", "5"]  # the expected answers in launch/demo/requests.jsonl
IMPORT = ("import torch\n", "import adapter\nimport torch\n")
CALL = """deepspeed.init_inference(pipe.model, dtype=data_type, mp_size=args.world_size,
                                          replace_with_kernel_inject=args.use_kernel, max_tokens=args.max_tokens)
"""
CALLS = {
    "kept": """deepspeed.init_inference(pipe.model, **adapter.deepspeed_kwargs(
        pipe.model, tp_size=args.world_size, max_tokens=args.max_tokens))
""",
    "adapters": """adapter.init_inference(model=pipe.model, max_tokens=args.max_tokens,
                                        tensor_parallel={"tp_size": args.world_size})
""",
}
pytestmark = pytest.mark.ranks


def changed(directory: Path, call: str) -> Path:
    """A copy of the script with an import more and another call; fails where that is more than three lines."""
    stock = text = STOCK.read_text()
    for old, new in (IMPORT, (CALL, CALLS[call])):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    new_lines = [line for line in difflib.ndiff(stock.splitlines(), text.splitlines()) if line.startswith("+ ")]
    gone = [line for line in difflib.ndiff(stock.splitlines(), text.splitlines()) if line.startswith("- ")]
    assert len(new_lines) == 3 and len(gone) == 2, (new_lines, gone)
    script = directory / f"{call}.py"
    script.write_text(text)
    return script


def answers(outcome: Outcome) -> tuple[list[str], list[str]]:
    """Texts and token lists, as the script printed them."""
    assert outcome.code == 0, outcome.err[-5000:]
    return re.findall(r"^out=(.*)$", outcome.out, re.M), re.findall(r"^tokens=(.*)$", outcome.out, re.M)


def run(ranks: int, script: Path, *more: str, launcher: str = "fork") -> Outcome:
    """With the adapter importable, as an installed one is; nothing else of the environment is changed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return launch(ranks, script, *ARGUMENTS, *more, launcher=launcher, env={"PYTHONPATH": path})


@pytest.fixture(scope="module")
def one_process() -> tuple[list[str], list[str]]:
    """What the script prints without DeepSpeed. Float32 tokens do not depend on the attention implementation."""
    texts, tokens = answers(run(1, STOCK, "--attn", "eager", launcher="alone"))
    assert texts == RIGHT and len(tokens) == len(RIGHT)
    return texts, tokens


@pytest.mark.parametrize(("ranks", "call", "attention", "launcher"), [
    (4, "kept", "eager", "fork"), (2, "adapters", "sdpa", "deepspeed"),
    pytest.param(4, "kept", "sdpa", "fork", marks=pytest.mark.sweep),
    pytest.param(4, "adapters", "eager", "fork", marks=pytest.mark.sweep),
])
def test_changed_script_prints_what_one_process_prints(tmp_path, one_process, ranks, call, attention, launcher):
    script = changed(tmp_path, call)
    assert answers(run(ranks, script, "--ds_inference", "--attn", attention, launcher=launcher)) == one_process


def test_a_script_that_ends_has_left_its_group(tmp_path):
    """Or gloo's threads may abort it. What is registered first runs last."""
    script = changed(tmp_path, "kept")
    script.write_text("import atexit\n\n\n@atexit.register\ndef reported():\n    import torch\n"
                      "    print(f'in a group: {torch.distributed.is_initialized()}\\n', end='')\n\n\n"
                      + script.read_text())
    outcome = run(2, script, "--ds_inference")
    assert outcome.code == 0, outcome.err[-3000:]
    assert outcome.out.count("in a group: False") == 2, outcome.out


def test_unchanged_script_dies_on_the_vision_encoder():
    """DeepSpeed 0.19.8 cuts `attn.qkv` and `attn.proj` both by columns. Where this fails, DeepSpeed has learnt it."""
    job = Job(4, STOCK, *ARGUMENTS, "--ds_inference", "--batch_size", "1")
    outcome = job.finish()
    for name in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{job.port}_*"):
        name.unlink()  # DeepSpeed leaves them, 69 MB a rank; with the adapter they go as soon as they are mapped
    assert not job.leftovers()
    assert outcome.code != 0
    assert "mat1 and mat2 shapes cannot be multiplied" in outcome.err
