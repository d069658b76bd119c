"""Decode steps captured and replayed, on CPU by what does as CUDA graphs do. This process becomes a rank.

A tape is as strict as a graph: operators are done again on the memory they had, numbers that Python or the caller holds
stay as they were when it was captured, and no value may be asked for on the way.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed
import transformers
from checkpoints import cases, make_checkpoint
from decoding import SHAPE, TWELVE, lean, loop_of, started
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapter
from adapter.config.load import from_dict
from adapter.generation import cuda_graph, kv_cache, loop
from adapter.generation.cuda_graph import CudaGraphStep
from adapter.generation.loop import DecodeLoop
from adapter.kernels import fused
from adapter.parallel.group import Group
from adapter.requests.finite import NonFiniteLogits
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

    def pool(self):
        return "the pool of the first graph"

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """A stream of the accelerator's: work of one waits for that of another where it is asked to."""

    def __init__(self) -> None:
        self.waited = []

    def wait_stream(self, other) -> None:
        self.waited.append(other)


class Taping:
    """What CudaGraphStep uses of DeepSpeed's accelerators. ran: (what, on which stream)."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.synchronized = 0
        self.main = self.now = Stream()
        self.pools, self.streams = [], []

    Stream = staticmethod(Stream)

    def current_stream(self):
        return self.now

    @contextmanager
    def stream(self, stream):
        self.now, before = stream, self.now
        self.streams.append(stream)
        yield
        self.now = before

    def synchronize(self) -> None:
        self.synchronized += 1

    def create_graph(self) -> Tape:
        return Tape()

    @contextmanager
    def capture_to_graph(self, graph, pool=None, stream=None):
        self.captured += 1
        self.pools.append(pool)
        self.streams.append(stream)
        with graph:
            yield

    def replay_graph(self, graph) -> None:
        assert self.now is self.main
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
    """The loop's accelerator, and torch's operators, as on a GPU."""
    accelerator = Taping()
    monkeypatch.setattr(loop, "CudaGraphStep", lambda _: CudaGraphStep(accelerator))
    monkeypatch.setattr(fused, "unavailable", lambda device: "as on a GPU")
    return accelerator


@pytest.fixture
def graphed(engine, taping, monkeypatch) -> DecodeLoop:
    """generate with graphs, of the sharded model: below what init_inference put around it."""
    return loop_of(engine, monkeypatch, graphs=True)


def logits_of(generate, inputs, **more):
    torch.manual_seed(5)
    with torch.inference_mode():
        return generate(**inputs, **TWELVE, **more, output_logits=True, return_dict_in_generate=True)


def first_rows(inputs: dict, rows: int) -> dict:
    return {name: tensor[:rows] for name, tensor in inputs.items()}


@lean
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.4}], ids=["greedy", "processor"])
@pytest.mark.parametrize("case", ["image", "batch"])
def test_tokens_of_replayed_steps_are_transformers_own(plain, graphed, taping, case, more):
    theirs, ours = (logits_of(generate, cases()[case], **more) for generate in (plain.generate, graphed))
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):  # of every step: none is written over by the next
        assert float((a - b).abs().max()) < 1e-4
    assert (taping.captured, taping.replayed) == (1, 11)  # the prompt gives the first token


@lean
def test_graphs_are_captured_once_for_an_engine_and_a_size(plain, graphed, taping):
    """Answers of about one size share a graph: rows are padded to a power of two, and so is the cache's length."""
    text = cases()["text"]
    ids = torch.randint(10, 200, (4, 23), generator=torch.Generator().manual_seed(2))
    four = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for inputs, captured in ((four, 1), (first_rows(four, 3), 1), (cases()["batch"], 1), (text, 2), (four, 2),
                             (first_rows(four, 2), 3), (text, 3)):
        theirs, ours = (logits_of(generate, inputs) for generate in (plain.generate, graphed))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert taping.captured == captured
    assert taping.pools == [None, *["the pool of the first graph"] * 2]


@lean
def test_a_step_is_tried_and_captured_on_one_stream(graphed, taping):
    """NCCL wants so; and the two streams wait for each other."""
    logits_of(graphed, cases()["text"])
    own = graphed.graphs.stream
    assert taping.streams == [own, own] and own.waited == [taping.main] and taping.main.waited == [own]


@lean
def test_a_longer_answer_looks_at_more_places_by_another_graph(plain, graphed, taping, monkeypatch):
    """And at no more than it needs: its first steps use the graph of the shorter one."""
    monkeypatch.setattr(kv_cache, "SMALLEST", 32)
    ids = torch.randint(10, 200, (1, 27), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs, ours = (logits_of(generate, inputs) for generate in (plain.generate, graphed))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert sorted(attended for _, _, attended in graphed.graphs.captured) == [32, 64]


@lean
def test_graphs_are_dropped_when_the_buffers_grow_and_at_the_end(plain, graphed, taping):
    logits_of(graphed, cases()["text"])
    ids = torch.randint(10, 200, (2, 300), generator=torch.Generator().manual_seed(2))
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs, ours = (logits_of(generate, longer) for generate in (plain.generate, graphed))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert [size[:2] for size in graphed.graphs.captured] == [(2, 512)] and taping.synchronized == 1
    theirs, ours = (logits_of(generate, cases()["text"]) for generate in (plain.generate, graphed))
    assert torch.equal(ours.sequences, theirs.sequences)
    graphed.graphs.release()
    assert not graphed.graphs.captured and taping.synchronized == 2


@lean
def test_graphs_are_dropped_when_weights_are_replaced(plain, graphed, taping):
    """They would go on reading the old ones."""
    logits_of(graphed, cases()["text"])
    first, second = graphed.model.model.language_model.layers
    first.mlp, second.mlp = second.mlp, first.mlp
    try:
        replayed = logits_of(graphed, cases()["text"])
        by_transformers = logits_of(graphed.generate, cases()["text"])
    finally:
        first.mlp, second.mlp = second.mlp, first.mlp
    assert torch.equal(replayed.sequences, by_transformers.sequences) and taping.captured == 2
    assert not torch.equal(replayed.sequences, logits_of(graphed, cases()["text"]).sequences)


@lean
def test_an_answer_that_is_not_finite_spoils_no_later_one(plain, graphed):
    """Its keys and values stay in the buffers; those of the next answer are zero where it has no token."""
    norm = graphed.model.model.language_model.layers[0].input_layernorm
    own, norm.weight = norm.weight, torch.nn.Parameter(torch.full_like(norm.weight, torch.inf), False)
    try:
        with pytest.raises(NonFiniteLogits):
            logits_of(graphed, cases()["batch"])
    finally:
        norm.weight = own
    theirs, ours = (logits_of(generate, cases()["text"]) for generate in (plain.generate, graphed))
    assert torch.equal(ours.sequences, theirs.sequences)


@lean
def test_an_engine_that_may_have_graphs_replays_them(directory, taping, monkeypatch):
    """All the way from init_inference; DeepSpeed, which refuses the key over several ranks, does not see it."""
    monkeypatch.setattr(cuda_graph, "wanted", lambda section, tp, *_: section["enable_cuda_graph"])
    config = {"model": {"path": str(directory), "dtype": "float32"}, "tensor_parallel": {"tp_size": 1},
              "deepspeed": {"enable_cuda_graph": True}}
    engine = adapter.init_inference(from_dict(config, directory))
    assert not engine._config.enable_cuda_graph
    engine.generate(**cases()["image"], **TWELVE)
    assert (taping.captured, taping.replayed) == (1, 11)


@lean
@pytest.mark.parametrize("compiled", [None, False], ids=["ours", "torch"])
def test_a_replayed_step_is_the_step(engine, compiled):
    """With either set of operators; those of torch are what runs on a GPU."""
    (eager, ids, cache), (same, _, other), taping = started(engine, compiled), started(engine, compiled, 8), Taping()
    captured = CudaGraphStep(taping)
    with torch.no_grad():
        for _ in range(7):
            logits = eager.step(ids, cache)
            assert float((captured(same.step, ids, other) - logits).abs().max()) < 1e-5
            ids = logits.argmax(-1)
    assert taping.replayed == 7


def test_a_cpu_has_no_graphs(caplog):
    """As with DeepSpeed's own: a configuration for both kinds of machine starts on both, and the log says what is."""
    assert not cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1))
    assert "a CPU has no graphs" in caplog.text
    assert not cuda_graph.wanted({}, Group(0, 1))


def test_ranks_that_sum_over_gloo_are_reported(engine, monkeypatch):
    """As ranks that share a GPU do. Asked of the real group of this process, as if there were a GPU."""
    class Gpu:
        device_name = staticmethod(lambda: "cuda")
        communication_backend_name = staticmethod(lambda: "nccl")

    monkeypatch.setattr(cuda_graph, "get_accelerator", Gpu)
    with pytest.raises(UserError, match=r"sum over gloo, which no graph can hold.*nccl"):
        cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 2, torch.distributed.group.WORLD))
    assert cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1))
    with pytest.raises(UserError, match="choose experts"):
        cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1), experts=2)
    with pytest.raises(UserError, match=r"Transformers' own loop decodes this model \(its norms are others\)"):
        cuda_graph.wanted({"enable_cuda_graph": True}, Group(0, 1), not_decoded="its norms are others")
