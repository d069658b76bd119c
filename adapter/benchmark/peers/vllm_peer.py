"""Time vLLM: its offline LLM class, eager, with prefix and processor caches off. Needs vLLM and nothing of ours.

Times are vLLM's own figures of the request: its first token counts from the request's arrival in the engine, which its
processing of the image follows. JSON lines: ready, then what was timed.
"""

from __future__ import annotations

import json
import os
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from peer import WARM_UP_TOKENS, arguments, json_lines

ENVIRONMENT = {  # one host, nothing fetched, nothing reported
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tp", type=int, required=True, help="ranks")
    parser.add_argument("--binding", required=True, help="cores of each rank, as VLLM_CPU_OMP_THREADS_BIND has them")
    parser.add_argument("--limits", type=json.loads, default={}, help="JSON: min_pixels and max_pixels of a image")
    args, write = parser.parse_args(), json_lines()
    os.environ |= {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": args.binding}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB a rank
    import vllm

    request, tokens = prompt(args.model, args.inputs)
    images = len(request.get("multi_modal_data", {"image": []})["image"])
    began = time.perf_counter()
    model = vllm.LLM(
        model=args.model, dtype=args.dtype, tensor_parallel_size=args.tp, max_model_len=tokens + args.new,
        max_num_seqs=1, max_num_batched_tokens=max(1024, tokens + args.new), enforce_eager=True,
        enable_prefix_caching=False, mm_processor_cache_gb=0, mm_processor_kwargs=args.limits, disable_log_stats=False,
        limit_mm_per_prompt={"image": images, "video": 0}, seed=0,
        **({"distributed_executor_backend": "mp"} if args.tp > 1 else {}))
    load_s = time.perf_counter() - began
    write({"ready": True})

    def run(new: int) -> Any:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
        return model.generate([request], sampling, use_tqdm=False)[0]

    cold, done = run(WARM_UP_TOKENS).metrics, run(args.new)
    own = done.metrics
    write({"load_s": round(load_s, 4), "cold_ttft_s": round(cold.first_token_latency, 4),
          "ttft_s": round(own.first_token_latency, 4),
          "decode_tok_s": round((args.new - 1) / (own.last_token_ts - own.first_token_ts), 4),
          "case": {"version": vllm.__version__, "prompt_tokens": len(done.prompt_token_ids),
                   "threads": args.binding}})


def prompt(model: str, inputs: str) -> tuple[dict[str, Any], int]:
    """The request as vLLM accepts it, with one token for each image, and the images; and its tokens in all."""
    from PIL import Image
    from safetensors.numpy import load_file

    tensors = load_file(inputs)
    image_token = json.loads((Path(model) / "config.json").read_text())["image_token_id"]
    whole = tensors["input_ids"][0].tolist()
    short = [token for value, run in groupby(whole) for token in ([value] if value == image_token else run)]
    images = [Image.fromarray(tensors[name]) for name in sorted(tensors) if name.startswith("image.")]
    media = {"multi_modal_data": {"image": images}} if images else {}
    return {"prompt_token_ids": short, **media}, len(whole)


if __name__ == "__main__":
    main()
