"""The request that is timed, and its tensors."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from adapter.config.load import parse_request
from adapter.config.schema import Config, Request
from policies.errors import UserError

if TYPE_CHECKING:
    from adapter.planning.plan import Plan
    from adapter.requests.processing import RequestProcessor

PROMPT, SIDE = "Describe this image in detail.", 448  # where a config has no requests; 283 tokens for the published 2B


def first_request(config: Config) -> Request:
    """The config's first request, or a question about a drawn image; no answer is expected of it."""
    if config.requests:
        return config.requests[0].model_copy(update={"expected": None})
    return parse_request({"id": "drawn", "prompt": PROMPT, "images": [drawn_image(SIDE)]})


def drawn_image(side: int) -> str:
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


def write_inputs(config: Config, plan: Plan, new_tokens: int, file: Path) -> None:
    """Write the request as safetensors, for engines that cannot prepare it themselves: what the model's forward takes,
    and the images before any resizing, uint8 [height, width, 3], as image.000 and so on. Raises UserError."""
    import safetensors.torch
    import torch

    from adapter.requests.media import load_image

    request = first_request(config)
    tensors = dict(make_processor(config, plan.geometry.context, new_tokens).prepare(request).tensors)
    images = [value for _, parts in request.turns() for kind, value in parts if kind == "image"]
    for number, image in enumerate(map(load_image, images)):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        tensors[f"image.{number:03}"] = pixels.view(image.height, image.width, 3)
    file.write_bytes(safetensors.torch.save(tensors))
