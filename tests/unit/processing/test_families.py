"""Sizes and tokens of images and videos are those of the family whose processor is in use."""

from __future__ import annotations

import pytest

from adapter.requests import media
from policies.errors import UserError


class ClipProcessor:
    """A video processor whose limits are those of the whole clip, as newer families have them."""

    size, patch_size, merge_size, temporal_patch_size = {"shortest_edge": 784, "longest_edge": 78400}, 14, 2, 2


def smart_resize(num_frames, height, width, temporal_factor=2, factor=28, min_pixels=1, max_pixels=1):
    scale = min(1.0, (max_pixels / (num_frames * height * width)) ** 0.5)
    return max(int(height * scale) // factor, 1) * factor, max(int(width * scale) // factor, 1) * factor


@pytest.mark.parametrize("frames, grid", [(2, (112, 112)), (4, (112, 112)), (16, (56, 56)), (100, (28, 28))])
def test_the_processors_own_family_chooses_the_size(frames, grid):
    """Its module's `smart_resize` is asked, with the number of frames where it takes that."""
    part = ClipProcessor()
    assert media.tokens(part, frames, 112, 112) == -(-frames // 2) * (grid[0] // 28) * (grid[1] // 28)
    assert media.kept_size(part, frames, 112, 112) == grid


def test_a_family_without_a_rule_for_sizes_is_refused():
    part = type("Part", (), dict(vars(ClipProcessor), __module__="builtins"))()
    with pytest.raises(UserError, match="Part: no smart_resize beside it"):
        media.tokens(part, 1, 56, 56)
