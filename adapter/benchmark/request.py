"""The request that is timed."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING

from adapter.config.load import parse_request
from adapter.config.schema import Config, Request

if TYPE_CHECKING:
    from torch import Tensor

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


def images_of(request: Request) -> dict[str, Tensor]:
    """Its images before any resizing, uint8 [height, width, 3], as image.000 and so on."""
    import numpy as np
    import torch

    from adapter.requests.media import load_image

    images = [value for _, parts in request.turns() for kind, value in parts if kind == "image"]
    return {f"image.{number:03}": torch.tensor(np.asarray(load_image(image))) for number, image in enumerate(images)}
