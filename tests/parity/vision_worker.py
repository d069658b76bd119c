"""One rank of a parity run with whole vision encoders: every case, and what each call of the encoder did.

    deepspeed --num_accelerators N vision_worker.py --out DIR MODEL_DIR VISION [MODEL_DIR VISION ...]

Writes NAME.tpN.VISION.safetensors as worker.py does, and prints a JSON line for each (rank 0).
"""

from __future__ import annotations

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
from safetensors.torch import save_file
from worker import equal_on_ranks, inputs_for, run

import adapter
from adapter.config.load import from_dict
from adapter.model.vision_data_parallel import encoder_of
from policies.errors import UserError

TP = int(os.environ["WORLD_SIZE"])


def watched(engine: Any) -> list[dict[str, Any]]:
    """Of each case's encoder calls: the grid, and how many collectives this rank was in; counted as the watch does."""
    calls: list[dict[str, Any]] = []
    progress, encoder = engine.mpu.tp.progress, encoder_of(engine.module, engine.plan)

    def before(_m: Any, args: Any, kwargs: Any) -> None:
        calls.append({"grid": kwargs["grid_thw"].tolist(), "collectives": -progress.state().entered})

    def after(*_: Any) -> None:
        calls[-1]["collectives"] += progress.state().entered

    hooks = [encoder.register_forward_pre_hook(before, with_kwargs=True), encoder.register_forward_hook(after)]
    for case in cases(engine.plan.geometry.sizes["vocab"], engine.plan.policy.model_type).values():
        with torch.inference_mode():
            engine.module(**inputs_for(case, "cpu"))
    for hook in hooks:
        hook.remove()
    return calls


def held(model: torch.nn.Module) -> int:
    """Bytes of memory that parameters live in, whoever else looks at them."""
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(stores.values())


def refusal(engine: Any) -> str:
    """The message about positions that a caller computed ahead, which newer releases allow."""
    encoder, case = encoder_of(engine.module, engine.plan), cases(engine.plan.geometry.sizes["vocab"])["two_images"]
    try:
        encoder(case["pixel_values"], grid_thw=case["image_grid_thw"], position_ids=torch.zeros(1))
    except (UserError, TypeError) as error:
        return str(error)
    return "nothing"


def main() -> None:
    out, *pairs = (a for a in sys.argv[1:] if not a.startswith("--"))
    for directory, vision in zip(map(Path, pairs[::2]), pairs[1::2], strict=True):
        section = {"tp_size": TP, "vision": vision, "desync_check": 1}
        engine = adapter.init_inference(from_dict({"model": {"path": str(directory), "dtype": "float32"},
                                                   "tensor_parallel": section}, Path(".")))
        tp, plan = engine.mpu.tp, engine.plan
        results = run(engine.module, engine.generate, plan.geometry.sizes["vocab"])
        results["equal_on_ranks"] = equal_on_ranks(results, tp)
        calls = watched(engine)
        counts = torch.tensor([c["collectives"] for c in calls] + [held(engine.module), plan.weight_bytes(tp.rank)])
        rows = tp.all_gather_last(counts, (len(counts),) * tp.size).view(tp.size, -1).tolist()
        refused = refusal(engine) if vision == "data" else ""
        # a model the caller loaded
        model = getattr(transformers, plan.policy.model_class).from_pretrained(
            directory.parent / "published" / directory.name, torch_dtype=torch.float32).eval()
        engine = adapter.init_inference(model=model, tensor_parallel=section)
        with torch.inference_mode():
            case = cases(plan.geometry.sizes["vocab"], plan.policy.model_type)["batch"]
            logits = engine.module(**(inputs := inputs_for(case, "cpu"))).logits
        loaded = float((logits[inputs["attention_mask"].bool()] - results["batch.logits"]).abs().max())
        if tp.rank == 0:
            save_file(results, Path(out) / f"{directory.name}.tp{TP}.{vision}.safetensors")
            os.write(1, (json.dumps({"model": directory.name, "vision": vision, "grids": [c["grid"] for c in calls],
                                     "ranks": rows, "loaded": loaded, "refused": refused}) + "\n").encode())


if __name__ == "__main__":
    main()
