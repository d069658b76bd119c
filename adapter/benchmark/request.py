"""The request that is timed, and its tensors for those that cannot prepare it themselves.

    python -m adapter.benchmark.request --config C --into FILE [key=value ...]

writes safetensors: what the model's forward takes, as adapter.requests.processing.Prepared has it, and the pictures as
they were before any resizing, uint8 [height, width, 3], under picture.000 and so on.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from typing import TYPE_CHECKING, NoReturn

from adapter.commands import common
from adapter.config.load import parse_request
from adapter.config.schema import Config, Request
from policies.errors import UserError

if TYPE_CHECKING:
    from adapter.requests.processing import RequestProcessor

PROMPT, SIDE = "Describe this image in detail.", 448  # where a config has no requests; 283 tokens for the published 2B


def first_request(config: Config) -> Request:
    """The config's first request, or a question about a drawn picture; no answer is expected of it."""
    if config.requests:
        return config.requests[0].model_copy(update={"expected": None})
    return parse_request({"id": "drawn", "prompt": PROMPT, "images": [drawn_picture(SIDE)]})


def drawn_picture(side: int) -> str:
    """A data: URL of a square PNG whose red grows to the right, its green downwards, its blue both ways."""
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 255, side)
    red, green = np.meshgrid(ramp, ramp)
    pixels = np.stack([red, green, (red + green) / 2], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def as_line(request: Request) -> str:
    """The request as a line of a requests file."""
    return json.dumps(request.model_dump(mode="json", exclude_none=True, exclude_defaults=True)) + "\n"


def make_processor(config: Config, context: int, new_tokens: int) -> RequestProcessor:
    """As adapter.requests.runner has it, with room for so many new tokens. Raises UserError."""
    from adapter.requests.batching import room
    from adapter.requests.processing import RequestProcessor

    most = room(config, context) - new_tokens
    if most < 1:
        raise UserError(f"--new {new_tokens}: prompt and answer together have {room(config, context)} tokens of room")
    return RequestProcessor(config.model.path, config.processor, most)


def main(args: argparse.Namespace, results: common.Results) -> int:
    from pathlib import Path

    import safetensors.torch
    import torch

    from adapter.config.load import load_config
    from adapter.planning.load import checked_plan
    from adapter.requests.media import load_image

    config = load_config(args.config, args.overrides)
    plan, _ = checked_plan(config.model.path, config.tensor_parallel.tp_size, config.model.dtype,
                           config.tensor_parallel.vision, config.weights.format)
    request = first_request(config)
    tensors = dict(make_processor(config, plan.geometry.context, args.new).prepare(request).tensors)
    pictures = [value for _, parts in request.turns() for kind, value in parts if kind == "image"]
    for number, value in enumerate(pictures):
        picture = load_image(value)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        tensors[f"picture.{number:03}"] = pixels.view(picture.height, picture.width, 3)
    Path(args.into).write_bytes(safetensors.torch.save(tensors))
    results.write({"prompt_tokens": tensors["input_ids"].shape[1]})
    return common.DONE


def start() -> NoReturn:
    arguments = common.parser(__doc__)
    arguments.add_argument("--into", required=True, metavar="FILE")
    arguments.add_argument("--new", type=int, required=True, help="tokens that will be generated")
    common.run(main, arguments)


if __name__ == "__main__":
    start()
