"""Prove a tensor-parallel engine on the user's own checkpoint and requests: tp_size ranks against one process.

For every request, and for some of them as one padded batch: greedy tokens and their logits as `engine.generate` decodes
them; one run over prompt and answer in which every module is checked by itself (adapter.verify.trace); the same run in
one process that streams the checkpoint (adapter.verify.reference), whose logits and tokens are those of plain
Transformers. Before that, the shards against the files (adapter.verify.reassembly).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from adapter.checkpoint.digest import digest, unlike
from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import Shards
from adapter.config.hub import shown
from adapter.config.schema import Config
from adapter.model.published import PublishedModules
from adapter.parallel.cpu import usable_cores
from adapter.parallel.group import Group, to_device
from adapter.requests.batching import Limits, Write, rank_facts, share
from adapter.requests.processing import TYPE_IDS, Prepared, RequestError, RequestProcessor, collate
from adapter.verify import bounds
from adapter.verify.comparison import Comparison
from adapter.verify.precision import full_precision
from adapter.verify.reassembly import Reassembly, reassembly
from adapter.verify.reference import Reference
from adapter.verify.trace import Trace

log = logging.getLogger("adapter")
PADDED = 4  # requests of the padded batch; logits of every position are held, 0.6 MB each at 152 k tokens
SAMPLED = 8  # tokens drawn to see whether the ranks draw alike
NEW_TOKENS = 32  # unless the config asks for fewer
FP32_LOGITS = 1e-4  # of the largest logit: what float32 runs are held to end to end
DECODE_RATIO = 4.0  # error of decoded logits over that of the same positions in one forward; both are the same rounding
BEAT_S = 2.0  # rank 0 says this often that it is still computing alone
SAMPLING = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # not the checkpoint's
PLAIN = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}


@dataclass(frozen=True)
class Ours:
    """What the ranks did with a case. inputs: those of a run over prompt and answer, input_ids int64 [B, S];
    decoded: float32 [B, new, vocab], logits as generated; logits: [B, S, vocab] of one forward; differ: what is not the
    same on every rank, and on which."""

    inputs: dict[str, Tensor]
    decoded: Tensor
    logits: Tensor
    trace: Trace
    differ: dict[str, list[int]]


class Verifier:
    """One engine against one process; every rank makes one and calls `run`.

    original: the model that shards were made from; without it they are held against themselves.
    """

    def __init__(self, config: Config, engine: deepspeed.InferenceEngine, tp: Group, checkpoint: Checkpoint | Shards,
                 processor: RequestProcessor | None, write: Write, original: Checkpoint | None = None) -> None:
        self.config, self.engine, self.tp, self.checkpoint = config, engine, tp, original or checkpoint
        self.shards = checkpoint if isinstance(checkpoint, Shards) else None
        self.processor, self.write = processor, write
        self.plan, self.dtype = engine.plan, config.model.torch_dtype
        self.layers = frozenset(f"{stack}.{i}" for stack, n in self.plan.geometry.layers.items() for i in range(n))
        self.checked: set[str] = set()  # modules that some case ran
        self.cores = usable_cores()  # several files, not to be read for each comparison
        self.reference: Reference | None = None
        if processor is not None:
            device = str(to_device(torch.empty(0)).device)
            self.reference = Reference(config.model.path, self.plan, self.checkpoint, self.dtype,
                                       config.model.attn_implementation, device)

    def run(self) -> bool:
        """Write a row per case and a summary (rank 0). Whether everything held, on every rank."""
        with full_precision():
            return self._run()

    def _run(self) -> bool:
        began, problems, rows = time.perf_counter(), [], []
        log.info("reassembly: hashing %d ranks' shards and the files", self.tp.size)
        shards = reassembly(self.engine.module, self.plan, self.tp, self.checkpoint, self.dtype)
        files = shards
        if self.shards and self.shards is not self.checkpoint:
            files = reassembly(self.engine.module, self.plan, self.tp, self.shards, self.dtype)
            problems += _differing(files)
        problems += _differing(shards)
        if unproven := self._unproven():
            log.warning("not checked: %s; set weights.original to the directory of the model that these shards were "
                        "made from", "; ".join(unproven))
        if self.processor is not None:
            for prepared in self._prepared():
                rows.append(self._row(*prepared))
                self.write(rows[-1])
            share({}, self.tp)
            problems += [f"{r['id']}: {p}" for r in rows for p in r.get("problems", [r.get("error")])]
        else:
            while inputs := share({}, self.tp):
                self._ours(inputs)
                self._wait()
        unchecked = sorted(self.plan.claims.keys() - self.checked)
        if self.tp.rank == 0 and rows and unchecked:
            log.warning("%d modules did not run in any case, their weights were compared only: %s ...; add a request "
                        "with an image", len(unchecked), unchecked[0])
        ranks = rank_facts(self.engine)
        passed = bool(self.tp.agreed(not problems))
        if self.tp.rank == 0:
            self.write({
                "summary": True, "model": _shown(self.config.model.path),
                "adapters": list(map(_shown, self.config.model.adapters)), "tp_size": self.tp.size,
                "dtype": self.config.model.dtype, "format": self.plan.form.name,
                "cases": len(rows), "passed": passed, "problems": problems,
                **_worst(rows), "reassembly": shards.row(), **({"shards": files.row()} if self.shards else {}),
                "not_checked": unproven, "unchecked": unchecked, "bound": bounds.STATEMENT, "ranks": ranks,
                "versions": {p: version(p) for p in ("torch", "deepspeed", "transformers")},
                "seconds": round(time.perf_counter() - began, 3),
            })
        return passed

    def _unproven(self) -> list[str]:
        """What nobody can know of shards without the model that they were made from."""
        if self.shards is None or self.shards is not self.checkpoint:
            return []
        quantised = [f"what {self.plan.form.name} costs: logits are held against the quantised weights"]
        return ["whether the shards are slices of that model"] + quantised * bool(self.plan.form.bits)

    def _prepared(self) -> Iterator[tuple[str, list[Prepared] | RequestError]]:
        """Each request by itself, then the first few that can be prepared together, padded."""
        assert self.processor is not None
        fit: list[Prepared] = []
        for request in self.config.requests:
            try:
                item = self.processor.prepare(request)
            except RequestError as error:
                yield request.id, error
                continue
            fit = [*fit, item] if len(fit) < PADDED else fit
            yield request.id, [item]
        if len(fit) > 1:
            yield "padded batch", fit

    def _row(self, name: str, prepared: list[Prepared] | RequestError) -> dict[str, Any]:
        """Rank 0: run a case and compare it."""
        assert self.processor is not None
        if isinstance(prepared, RequestError):
            log.error("request %s failed: %s", prepared.request_id, prepared.reason)
            return {"id": name, "error": prepared.reason}
        began = time.perf_counter()
        inputs = collate(prepared, self.processor.pad_token_id)
        ours = self._ours(share(inputs, self.tp))
        one, layers = self._one_process(ours)
        facts = compare(ours, one, self.dtype)
        first = ours.trace.first_wrong()
        modules = _by_layer(ours.trace.comparisons, self.layers)
        self.checked |= {c.module for c in ours.trace.comparisons}
        if ours.trace.replayer.unproven:
            log.warning("%s: scores or states so large that rounding them explains any output: %s; sdpa or float32 "
                        "tells more", name, ", ".join(sorted(ours.trace.replayer.unproven)))
        answers = [[self._decode(row) for row in t] for t in (facts.pop("our_tokens"), facts.pop("one_process_tokens"))]
        single = len(prepared) == 1
        row = {
            "id": name, "requests": [p.id for p in prepared], "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": ours.decoded.shape[1], "answer": answers[0][0] if single else answers[0],
            "one_process_answer": answers[1][0] if single else answers[1], **facts,
            "first_divergent_module": first and _finding(first), "modules_checked": len(ours.trace.comparisons),
            "ranks_agree": not ours.differ, "encoder_calls": ours.trace.encoder_modes,
            "unproven": sorted(ours.trace.replayer.unproven),
            "layers": [{"name": n, "error": e, "share_of_bound": modules[n]} for n, e in layers],
        }
        worst = max(ours.trace.comparisons, key=lambda c: c.share)
        row |= {"largest_share_of_bound": worst.share, "largest_at": f"{worst.module or '(model)'}: {worst.what}"}
        row["problems"] = list(_problems(row, ours.differ, self.config.model.dtype, bool(self.plan.form.bits)))
        log.info("%s: %s, logits differ by %.1e at most, %d of %d tokens equal, %d checks, %.1f s", name,
                 "held" if not row["problems"] else "DID NOT HOLD", row["max_abs_logit_diff"],
                 *row["greedy_match"].values(), row["modules_checked"], time.perf_counter() - began)
        return row | {"passed": not row["problems"]}

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.processor is not None
        ends = self.engine.module.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        stop = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
        return self.processor.decode(tokens[:stop])

    def _ours(self, inputs: dict[str, Tensor]) -> Ours:
        """Every rank: decode greedily, draw a sample, then run over the whole answer with every module watched."""
        inputs = {k: to_device(v) for k, v in inputs.items()}
        limits = Limits.of(self.config, self.plan.geometry.context, self.engine.module.generation_config)
        prompt = inputs["input_ids"].shape[1]
        new = min(NEW_TOKENS, limits.for_prompt(prompt)["max_new_tokens"])
        # a rank that differs must not stop earlier than the others, which would wait for it: the count is fixed
        media = [t for name in self.plan.policy.media_tokens
                 if (t := getattr(self.engine.module.config, name, None)) is not None]
        greedy = PLAIN | {"max_new_tokens": new, "min_new_tokens": new, "suppress_tokens": media}
        decoded = self.engine.generate(**inputs, **greedy)
        draw = SAMPLING | {"max_new_tokens": min(SAMPLED, new), "min_new_tokens": min(SAMPLED, new)}
        sampled = self.engine.generate(**inputs, **draw)
        inputs = _extended(inputs, self.tp.broadcast(decoded.sequences.clone()))
        trace = Trace(self.engine.module, self.plan, self.tp, self.reference.skeleton if self.reference else {},
                      self.reference.expected if self.reference else lambda *_: iter(()),
                      self.config.model.attn_implementation == "eager", keep=self.layers, judging=self._judging,
                      parameters=self.reference.weights if self.reference else lambda _: {})
        with torch.inference_mode(), trace.watching():
            logits = self.engine.module(**inputs, use_cache=False).logits
        differ = self._differ({"greedy tokens": decoded.sequences, "sampled tokens": sampled})
        return Ours(inputs, torch.stack(decoded.logits, 1).float(), logits, trace, differ)

    def _differ(self, results: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Of each result the ranks whose copy is not what most ranks have."""
        mine = to_device(torch.tensor([digest(t) for t in results.values()]))
        rows = self.tp.all_gather_last(mine, (len(mine),) * self.tp.size).view(self.tp.size, -1)
        odd = {name: list(unlike(rows[:, i].tolist())) for i, name in enumerate(results)}
        return {name: ranks for name, ranks in odd.items() if ranks}

    def _one_process(self, ours: Ours) -> tuple[Tensor, list[tuple[str, float]]]:
        """Rank 0: logits [B, S, vocab] of plain Transformers in float32, and each layer's accumulated error on the way:
        largest |difference| to the sharded run over the layer's largest output."""
        assert self.reference is not None
        seen, errors = defaultdict(list), []
        for name, output in ours.trace.kept:
            seen[name].append(output)
        mask = ours.inputs["attention_mask"].bool()

        def look(name: str, output: Any) -> None:
            one = (output[0] if isinstance(output, tuple) else output).float()
            mine = seen[name].pop(0).float()
            if one.shape[:2] == mask.shape:
                one, mine = one[mask], mine[mask]
            errors.append((name, float((one - mine).abs().max() / one.abs().max())))

        with self._alone() as tick, _cores(self.cores), self.reference.streaming(tick) as model, torch.inference_mode():
            modules = PublishedModules(model, self.plan.policy)
            hooks = [modules[n].register_forward_hook(lambda _m, _a, out, n=n: look(n, out)) for n in self.layers]
            floats = {k: v.float() if v.is_floating_point() else v for k, v in ours.inputs.items()}
            logits = model(**floats, use_cache=False).logits
            for hook in hooks:
                hook.remove()
        return logits, errors

    @contextmanager
    def _alone(self) -> Iterator[Callable[[], None]]:
        """Let rank 0 compute while the others `_wait`. Yields a tick for it to call, which tells them from time to time
        that it still computes, so that no collective's time limit ends a long run."""
        last = [time.monotonic()]

        def tick() -> None:
            if time.monotonic() - last[0] > BEAT_S:
                self.tp.agreed(1)
                last[0] = time.monotonic()

        yield tick
        self.tp.agreed(0)

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Rank 0 compares with all cores, while the others sleep and do not busy-wait in the next all-reduce."""
        with _cores(self.cores) if self.tp.rank == 0 else nullcontext():
            yield
        if self.tp.route.busy_waits:
            self.tp.agreed(0)

    def _wait(self) -> None:
        while self.tp.agreed(0):
            pass


@contextmanager
def _cores(cores: int) -> Iterator[None]:
    """Ranks share the cores of a host, one thread each as a rule; what runs alone may have all `cores`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, cores))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shown(path: Path) -> str:
    """A model directory as reports name it, which others read: inside the current directory its path, else its name."""
    if (repository := shown(path)) != str(path):
        return repository
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _extended(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The inputs of a run over prompt and answer."""
    new = tokens.shape[1] - inputs["input_ids"].shape[1]
    fill = {"attention_mask": 1, "mm_token_type_ids": 0}
    longer = {k: nn.functional.pad(inputs[k], (0, new), value=v) for k, v in fill.items() if k in inputs}
    out = {**inputs, **longer, "input_ids": tokens}
    if TYPE_IDS and not any("grid" in key for key in out):
        # without media these releases count padding as positions in a forward, but not in generate
        out["position_ids"] = (out["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return out


def compare(ours: Ours, one: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Logits and greedy tokens of the ranks and of one process, on the same tokens.

    A token is greedy for either side given the same beginning, so that one that differs does not make all later ones
    differ. decode_error_ratio: the largest root mean square error of decoded logits of a position over that of the same
    positions in one forward (and what float32 runs are allowed anyway, or what rounding the logits alone may do).
    """
    new = ours.decoded.shape[1]
    mask = ours.inputs["attention_mask"].bool()
    at, largest = one[:, -new - 1:-1], float(one.abs().max())
    off = (ours.decoded - at).abs()
    most, total, count = float(off.max()), float(off.sum()), off.numel()
    for b in range(len(one)):
        error = (one[b][mask[b]] - ours.logits[b][mask[b]].float()).abs()
        most = float(torch.tensor([most, float(error.max())]).max())  # Python's own max would lose a NaN
        total, count = total + float(error.sum()), count + error.numel()
    floor = bounds.unit_roundoff(dtype) * largest
    if dtype is torch.float32:
        floor = FP32_LOGITS / DECODE_RATIO * max(1.0, largest)
    forward = float((ours.logits[:, -new - 1:-1].float() - at).square().mean(-1).sqrt().max())
    mine, theirs = ours.decoded.argmax(-1), at.argmax(-1)
    best = at.topk(2, -1).values
    parted = [
        {"row": b, "position": i, "ours": int(mine[b, i]), "one_process": int(theirs[b, i]),
         "top2_gap": float(best[b, i, 0] - best[b, i, 1])} for b, i in (mine != theirs).nonzero().tolist()
    ]
    return {
        "our_tokens": mine.tolist(), "one_process_tokens": theirs.tolist(),
        "max_abs_logit_diff": most, "mean_abs_logit_diff": total / count, "largest_logit": largest,
        "greedy_match": {"equal": int((mine == theirs).sum()), "of": mine.numel()},
        "parted": parted,
        "decode_error_ratio": float(off.square().mean(-1).sqrt().max()) / (forward + floor),
    }


def _problems(row: Mapping[str, Any], differ: Mapping[str, list[int]], dtype: str, quantised: bool) -> Iterator[str]:
    """Why a case did not hold. Tokens that part are the consequence of logits that differ, and judged by those.

    quantised: then logits differ by what the format costs, which is stated and not judged; the modules are.
    """
    if first := row["first_divergent_module"]:
        at = f" (rank {', '.join(map(str, first['ranks']))})" if first["ranks"] else ""
        yield f"{first['module']}: {first['what']}{at}: error {first['error']:.3g}, bound {first['bound']:.3g}"
    for what, ranks in differ.items():
        yield f"{what} differ on rank {', '.join(map(str, ranks))}"
    if quantised:
        return
    limit = FP32_LOGITS * max(1.0, row["largest_logit"])
    if dtype == "float32" and not row["max_abs_logit_diff"] <= limit:
        yield (f"logits differ by {row['max_abs_logit_diff']:.3g}, in float32 at most {limit:.3g} is rounding; of all "
               f"modules {row['largest_at']} is nearest to its bound, at {row['largest_share_of_bound']:.2g} of it")
    if not row["decode_error_ratio"] <= DECODE_RATIO:
        yield (f"decoding token by token differs {row['decode_error_ratio']:.3g} times as much from one process as the "
               f"same positions in one forward, at most {DECODE_RATIO} is rounding: look at the KV cache and the "
               "positions of new tokens")


def _differing(found: Reassembly) -> list[str]:
    return [f"{d['tensor']} on rank {d['rank']}: {d['why']}" for d in found.differing]


def _finding(check: Comparison) -> dict[str, Any]:
    return {"module": check.module or "(model)", "what": check.what, "error": check.error, "bound": check.bound,
            "ranks": list(check.ranks)}


def _by_layer(checks: Sequence[Comparison], layers: frozenset[str]) -> dict[str, float]:
    """Layer -> the largest share of a bound in it."""
    out = dict.fromkeys(layers, 0.0)
    for check in checks:
        names = accumulate(check.module.split("."), "{}.{}".format)  # the module's own and those around it
        if layer := next((name for name in names if name in out), None):
            out[layer] = max(out[layer], check.share)
    return out


def _worst(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The contract's figures over all cases."""
    ran = [r for r in rows if "error" not in r]
    if not ran:
        return {}
    diverging = [r["first_divergent_module"] for r in ran if r["first_divergent_module"]]
    return {
        "max_abs_logit_diff": max(r["max_abs_logit_diff"] for r in ran),
        "greedy_match": {k: sum(r["greedy_match"][k] for r in ran) for k in ("equal", "of")},
        "first_divergent_module": diverging[0] if diverging else None,
        "largest_share_of_bound": max(r["largest_share_of_bound"] for r in ran),
    }
