"""One rank of a parity run: every model given, every case, logits and tokens of rank 0 to a file.

    deepspeed --num_accelerators N worker.py --out DIR MODEL_DIR [MODEL_DIR ...]
    python worker.py --plain --out DIR MODEL_DIR ...          one process, plain Transformers, no adapter: the reference
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from checkpoints import cases
from packaging.version import Version
from safetensors.torch import save_file

NEW = 32
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
SHORT = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
BEAMS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
SAMPLED = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}


def inputs_for(case: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    keep = {k: v.to(device) for k, v in case.items()}
    if Version(transformers.__version__) < Version("5"):
        keep.pop("mm_token_type_ids")
    return keep


def run(model, generate, vocab: int, device: str = "cpu", only: str = "") -> dict[str, torch.Tensor]:
    """Logits of the whole prompt and greedy tokens of every case; beams and a seeded sample of one. only: this case."""
    out: dict[str, torch.Tensor] = {}
    for name, case in cases(vocab, model.config.model_type).items():
        if only not in ("", name):
            continue
        inputs = inputs_for(case, device)
        with torch.inference_mode():
            logits = model(**inputs).logits.float()
        out[f"{name}.logits"] = logits[inputs["attention_mask"].bool()].contiguous()
        out[f"{name}.tokens"] = generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1]:].contiguous()
    if only:
        return {k: v.cpu() for k, v in out.items()}
    inputs = inputs_for(cases(vocab)["image"], device)
    out["beams.tokens"] = generate(**inputs, **BEAMS)
    positional = {k: v for k, v in inputs_for(cases(vocab)["text"], device).items() if k != "input_ids"}
    out["positional.tokens"] = generate(inputs_for(cases(vocab)["text"], device)["input_ids"], **positional, **SHORT)
    torch.manual_seed(7 + int(os.environ.get("RANK", 0)))  # ranks disagree about the seed: rank 0's must win
    out["sampled.tokens"] = generate(**inputs, **SAMPLED)
    return {k: v.cpu().contiguous() for k, v in out.items()}


def equal_on_ranks(results: dict[str, torch.Tensor], tp) -> torch.Tensor:
    """For each result: is every rank's copy bit for bit that of rank 0?"""
    flags = []
    for key in sorted(results):
        mine = results[key]
        theirs = tp.broadcast(mine.clone())
        flags.append(torch.equal(mine, theirs))
    everyone = tp.all_gather_last(torch.tensor(flags, dtype=torch.uint8), (len(flags),) * tp.size) if tp.size > 1 \
        else torch.tensor(flags, dtype=torch.uint8)
    return everyone.view(tp.size, -1).all(0)


def load(directory: Path) -> Any:
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, torch_dtype=torch.float32).eval()


def three_lines(model: Any) -> Any:
    """`generate` of a loaded model that has become a shard."""
    import deepspeed

    import adapter

    engine = deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, tp_size=int(os.environ["WORLD_SIZE"])))
    return engine.generate


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--plain", action="store_true")
    p.add_argument("--loaded", action="store_true", help="each rank loads the whole model and shards it")
    p.add_argument("--device", default="cpu", help="where the plain model runs")
    p.add_argument("--local_rank", type=int)
    p.add_argument("--format", default="dense", help="of the weights")
    p.add_argument("--only", default="", help="case")
    p.add_argument("--adapters", default="", help="of the models: directories with commas between them")
    p.add_argument("--experts", default="tensor", help="tensor_parallel.experts")
    p.add_argument("models", nargs="+", type=Path)
    args = p.parse_args()
    for directory in args.models:
        if args.plain or args.loaded:
            model = load(directory).to(args.device)
            generate = three_lines(model) if args.loaded else model.generate
            results = run(model, generate, model.config.get_text_config().vocab_size, args.device, args.only)
            if os.environ.get("RANK", "0") == "0":
                save_file(results, args.out / f"{directory.name}.{'loaded' if args.loaded else 'plain'}.safetensors")
            continue
        import adapter
        from adapter.config.load import from_dict

        engine = adapter.init_inference(from_dict({
            "model": {"path": str(directory), "dtype": "float32",
                      "adapters": [name for name in args.adapters.split(",") if name]},
            "tensor_parallel": {"tp_size": int(os.environ.get("WORLD_SIZE", 1)), "experts": args.experts},
            "weights": {"format": args.format}}, Path(".")))
        tp = engine.mpu.tp
        device = str(next(engine.module.parameters()).device)
        results = run(engine.module, engine.generate, engine.plan.geometry.sizes["vocab"], device, args.only)
        results["equal_on_ranks"] = equal_on_ranks(results, tp)
        facts = torch.tensor([engine.load_report.weight_bytes, engine.load_report.bytes_read])
        results["bytes"] = facts if tp.size == 1 else tp.all_gather_last(facts, (2,) * tp.size)
        if tp.rank == 0:
            save_file(results, args.out / f"{directory.name}.tp{tp.size}.safetensors")


if __name__ == "__main__":
    main()
