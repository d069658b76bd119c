"""Decode steps captured and replayed, on CPU by what does as CUDA graphs do. This process becomes a rank.

A tape is as strict as a graph: operators are done again on the memory they had, numbers that Python or the caller holds
stay as they were when it was captured, and no value may be asked for on the way.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed
import transformers
from checkpoints import cases, make_checkpoint
from decoding import SHAPE, TWELVE, lean, started
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapter
from adapter.config.load import from_dict
from adapter.generation import cuda_graph, loop
from adapter.generation.cuda_graph import CudaGraphStep
from adapter.generation.loop import DecodeLoop
from adapter.kernels.fused import TorchOps
from adapter.parallel.group import Group
from policies.errors import UserError


class Tape(TorchDispatchMode):
    """The operators between entering and leaving; what they wrote is undone on leaving: capturing launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.written = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is asked for while a graph is captured")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        self.written += [(given[a.name], given[a.name].clone()) for a in func._schema.arguments
                         if a.alias_info and a.alias_info.is_write and a.name in given]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *failed):
        super().__exit__(*failed)
        for tensor, before in reversed(self.written):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taping:
    """The three calls of DeepSpeed's accelerators that CudaGraphStep makes."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def create_graph(self) -> Tape:
        return Tape()

    @contextmanager
    def capture_to_graph(self, graph, pool=None, stream=None):
        self.captured += 1
        with graph:
            yield

    def replay_graph(self, graph) -> None:
        self.replayed += 1
        graph.replay()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("graphs") / "m", SHAPE)


@pytest.fixture(scope="module")
def engine(directory):
    config = {"model": {"path": str(directory), "dtype": "float32"}, "tensor_parallel": {"tp_size": 1},
              "deepspeed": {"enable_cuda_graph": True}}  # a CPU has none: it starts all the same
    return adapter.init_inference(from_dict(config, directory))


@pytest.fixture(scope="module")
def plain(directory):
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()


@pytest.fixture
def taping(monkeypatch) -> Taping:
    accelerator = Taping()
    monkeypatch.setattr(loop, "get_accelerator", lambda: accelerator)
    return accelerator


@pytest.fixture
def graphed(engine, monkeypatch) -> DecodeLoop:
    """generate with graphs, of the sharded model: below what init_inference put around it."""
    monkeypatch.delattr(engine.module, "generate")
    return DecodeLoop(engine.module, engine.plan, graphs=True)


@lean
@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.4}],
                         ids=["greedy", "sampled", "processor"])
@pytest.mark.parametrize("case", ["image", "batch"])
def test_tokens_of_replayed_steps_are_transformers_own(plain, graphed, taping, case, more):
    asked = {**TWELVE, **more, "output_logits": True, "return_dict_in_generate": True}
    results = []
    for generate in (plain.generate, graphed):
        torch.manual_seed(5)
        with torch.inference_mode():
            results.append(generate(**cases()[case], **asked))
    theirs, ours = results
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):  # of every step: none is written over by the next
        assert float((a - b).abs().max()) < 1e-4
    assert (taping.captured, taping.replayed) == (1, 10)  # the prompt's token, a first step, and ten


@lean
def test_an_engine_that_may_have_graphs_replays_them(directory, taping, monkeypatch):
    """All the way from init_inference; DeepSpeed, which refuses the key over several ranks, does not see it."""
    monkeypatch.setattr(cuda_graph, "wanted", lambda section, tp: section["enable_cuda_graph"])
    config = {"model": {"path": str(directory), "dtype": "float32"}, "tensor_parallel": {"tp_size": 1},
              "deepspeed": {"enable_cuda_graph": True}}
    engine = adapter.init_inference(from_dict(config, directory))
    assert not engine._config.enable_cuda_graph
    engine.generate(**cases()["image"], **TWELVE)
    assert (taping.captured, taping.replayed) == (1, 10)


@lean
@pytest.mark.parametrize("ops", [None, TorchOps], ids=["ours", "torch"])
def test_a_replayed_step_is_the_step(engine, ops):
    """With either set of operators; those of torch are what runs on a GPU."""
    (eager, ids, state), (same, _, other), taping = started(engine, ops), started(engine, ops), Taping()
    captured = CudaGraphStep(partial(same.step, state=other), taping)
    with torch.no_grad():
        for _ in range(7):
            logits = eager.step(ids, state)
            assert torch.equal(captured(ids), logits)
            ids = logits.argmax(-1)
    assert taping.replayed == 6


def test_a_cpu_has_no_graphs(caplog):
    """As with DeepSpeed's own: a configuration for both kinds of machine starts on both, and the log says what is."""
    assert not cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1))
    assert "a CPU has no graphs" in caplog.text
    assert not cuda_graph.wanted({}, Group(0, 1))


def test_ranks_that_sum_over_gloo_are_told(engine, monkeypatch):
    """As ranks that share a GPU do. Asked of the real group of this process, as if there were a GPU."""
    class Gpu:
        device_name = staticmethod(lambda: "cuda")
        communication_backend_name = staticmethod(lambda: "nccl")

    monkeypatch.setattr(cuda_graph, "get_accelerator", Gpu)
    with pytest.raises(UserError, match=r"sum over gloo, which no graph can hold.*nccl"):
        cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 2, torch.distributed.group.WORLD))
    assert cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1))
