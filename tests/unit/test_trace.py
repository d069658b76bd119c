"""The ranks of a trace compare what they saw also where one has run modules that another has not; ranks are threads."""

from __future__ import annotations

import pytest
import torch
import transformers
from checkpoints import Shape, make_checkpoint
from threads import in_ranks

from adapter.planning.load import checked_plan
from adapter.verify.trace import Trace
from policies.errors import CheckFailed

NORMS = ("model.norm", "model.layers.0.input_layernorm")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("trace") / "m", Shape(layers=1, v_layers=1))
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()
    return directory, model.state_dict(), model.config


def traced(parts, calls):
    """Run the modules calls[rank] on each of the ranks -> what each rank found or raised."""
    directory, state, config = parts
    plan, _ = checked_plan(directory, len(calls), "float32")
    models = [transformers.Qwen2VLForConditionalGeneration(config).eval() for _ in calls]
    for model in models:
        model.load_state_dict(state)

    def run(tp):
        trace = Trace(models[tp.rank], plan, tp, {}, lambda *_: iter(()), eager=False, only=NORMS)
        with torch.inference_mode(), trace.watching():
            for name, value in calls[tp.rank]:
                trace.modules[name](torch.full((1, 2, plan.geometry.sizes["hidden"]), value))
        return [(c.module, c.what, c.ranks) for c in trace.comparisons]

    return in_ranks(len(calls), run)[0]


def test_ranks_that_run_the_same_modules_are_compared(parts):
    same, other = [(NORMS[1], 1.0), (NORMS[0], 1.0)], [(NORMS[1], 1.0), (NORMS[0], -1.0)]
    assert traced(parts, [same, same, same]) == [[]] * 3
    found = [("", "input of model.norm differs between ranks", (1,)),
             ("model.norm", "output differs between ranks", (1,))]
    assert traced(parts, [same, other, same]) == [found] * 3


@pytest.mark.parametrize("calls, words", [
    ([[0], [0, 0], [0]], ["rank 1 ", "after 1 ", "model.norm", "nothing more"]),
    ([[1, 0], [1, 0], [0]], ["rank 2 ", "after 0 ", "model.norm", "model.layers.0.input_layernorm"]),
    ([[], [1], [1]], ["rank 0 ", "after 0 ", "nothing more", "model.layers.0.input_layernorm"]),
    ([[1], [0]], ["rank 1 ", "after 0 ", "model.norm", "model.layers.0.input_layernorm"]),
])
def test_ranks_that_run_other_modules_are_named_with_the_module(parts, calls, words):
    results = traced(parts, [[(NORMS[i], 1.0) for i in rank] for rank in calls])
    assert all(isinstance(error, CheckFailed) for error in results), results
    assert len(set(map(str, results))) == 1
    assert all(word in str(results[0]) for word in words), results[0]
