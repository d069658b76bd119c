"""Draw the demo's pictures and clips, and the questions that go with them.

Everything is a pure function of a numpy generator: the same seed gives the same pixels. A picture is a uint8 array
[SIDE, SIDE, 3]; a clip is a sequence of such frames. `KINDS` is the table of questions: how each is asked and drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
Rng = np.random.Generator
Point = tuple[float, float]

SIDE = 112  # pixels: 8 x 8 patches of 14, merged 2 x 2 into 16 tokens
FRAME_COUNTS = (4, 6, 8)  # a clip of 2, 3 or 4 seconds, sampled at 2 frames per second
CELL = 28  # pixels a token covers
CODES = 29  # what `cells` tells apart: nothing, or 7 colours x 4 outlines
MOST = 5  # shapes in one picture

COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 205),
    "yellow": (240, 215, 40),
    "orange": (245, 130, 20),
    "purple": (130, 45, 165),
    "black": (25, 25, 25),
}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # steps in x and y
PLACES = {  # fractions of the side, x and y
    "top left": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.8, 0.2),
    "left": (0.2, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.8, 0.8),
}


def _spokes(*radii: float, turn: float = 0.0) -> tuple[Point, ...]:
    """Corners at the given distances from the centre, evenly spread in angle; `turn` is a part of a full turn."""
    angles = (2 * math.pi * (i / len(radii) + turn) for i in range(len(radii)))
    return tuple((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True))


OUTLINES = {  # corners, in units of the shape's radius
    "circle": _spokes(*[1.0] * 32),
    "square": _spokes(*[1.2] * 4, turn=1 / 8),
    "triangle": _spokes(*[1.25] * 3, turn=-1 / 4),
    "cross": _spokes(*[1.15, 1.15, 0.5] * 4, turn=-1 / 24),
}


COUNTS = tuple(str(i) for i in range(1, MOST + 1))
FACTS: tuple[Collection[str], ...] = (COLOURS, OUTLINES, PLACES, COUNTS)  # about a whole picture


@dataclass(frozen=True)
class Shape:
    """One drawn shape: centre and radius in pixels, turn in radians, tint added to the colour's channels."""

    name: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float
    tint: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """One question about `images`, or about the one clip made of `frames`, and its only right answer."""

    kind: str
    prompt: str
    answer: str
    images: tuple[Picture, ...] = ()
    frames: tuple[Picture, ...] = ()


Drawing = tuple[tuple[Picture, ...], str]  # pictures, or the frames of one clip, and the answer


@dataclass(frozen=True)
class Kind:
    """A kind of question: `layout` is 1 or 2 for that many pictures, "clip" for one clip."""

    layout: str
    prompts: tuple[str, ...]
    draw: Callable[[Rng], Drawing]


def _pick(rng: Rng, options: Iterable[str]) -> str:
    names = tuple(options)
    return names[int(rng.integers(len(names)))]


def _shape(rng: Rng, centre: Point, radius: Point = (16.0, 20.0)) -> Shape:
    return Shape(
        name=_pick(rng, OUTLINES),
        colour=_pick(rng, COLOURS),
        x=centre[0],
        y=centre[1],
        radius=rng.uniform(*radius),
        turn=rng.uniform(-0.05, 0.05),
        tint=tuple(int(v) for v in rng.integers(-12, 13, 3)),
    )


def _ground(rng: Rng) -> tuple[int, ...]:
    """A light background: a grey level with a slight cast."""
    return tuple(int(v) for v in rng.integers(205, 245) + rng.integers(-10, 11, 3))


def _render(rng: Rng, shapes: Iterable[Shape], ground: tuple[int, ...]) -> Picture:
    """Paint the shapes in order over the background, then add pixel noise of up to 6 levels."""
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(canvas)
    for s in shapes:
        cos, sin = math.cos(s.turn) * s.radius, math.sin(s.turn) * s.radius
        corners = [(s.x + x * cos - y * sin, s.y + x * sin + y * cos) for x, y in OUTLINES[s.name]]
        fill = tuple(min(255, max(0, c + t)) for c, t in zip(COLOURS[s.colour], s.tint, strict=True))
        draw.polygon(corners, fill=fill)
    noise = rng.integers(-6, 7, (SIDE, SIDE, 3), dtype=np.int16)
    return np.clip(np.asarray(canvas, dtype=np.int16) + noise, 0, 255).astype(np.uint8)


def cells(shapes: Iterable[Shape]) -> NDArray[np.int64]:
    """What each 28-pixel cell, one token of the picture, holds the centre of: 0, or a number per colour and outline."""
    grid = np.zeros((SIDE // CELL, SIDE // CELL), dtype=np.int64)
    for s in shapes:
        code = 1 + list(COLOURS).index(s.colour) * len(OUTLINES) + list(OUTLINES).index(s.name)
        grid[int(s.y) // CELL, int(s.x) // CELL] = code
    return grid.reshape(-1)


def _at(rng: Rng, place: str) -> Point:
    """A point within 2 pixels of a place."""
    x, y = (p * SIDE + rng.uniform(-2, 2) for p in PLACES[place])
    return x, y


def _single(rng: Rng) -> tuple[Picture, Shape, str]:
    """A picture of one shape, the shape, and the name of its place."""
    place = _pick(rng, PLACES)
    shape = _shape(rng, _at(rng, place))
    return _render(rng, [shape], _ground(rng)), shape, place


def _several(rng: Rng, count: int) -> tuple[Picture, list[Shape]]:
    """A picture of `count` shapes at different places, and the shapes."""
    places = rng.choice(list(PLACES), count, replace=False)
    shapes = [_shape(rng, _at(rng, place), radius=(11.0, 13.0)) for place in places]
    return _render(rng, shapes, _ground(rng)), shapes


def _colour(rng: Rng) -> Drawing:
    picture, shape, _ = _single(rng)
    return (picture,), shape.colour


def _name(rng: Rng) -> Drawing:
    picture, shape, _ = _single(rng)
    return (picture,), shape.name


def _place(rng: Rng) -> Drawing:
    picture, _, place = _single(rng)
    return (picture,), place


def _count(rng: Rng) -> Drawing:
    count = int(rng.integers(1, MOST + 1))
    return (_several(rng, count)[0],), str(count)


def _more(rng: Rng) -> Drawing:
    few, many = sorted(int(v) for v in rng.choice(MOST, 2, replace=False) + 1)
    answer = _pick(rng, ("first", "second"))
    counts = (many, few) if answer == "first" else (few, many)
    return tuple(_several(rng, count)[0] for count in counts), answer


def _moving(rng: Rng, move: str, count: int) -> tuple[Picture, ...]:
    """`count` frames of one shape that crosses the middle of the picture at an even pace."""
    dx, dy = MOVES[move]
    step = rng.uniform(44, 68) / (count - 1)
    x, y = SIDE / 2 + rng.uniform(-8, 8, 2) + (dy * rng.uniform(-22, 22), dx * rng.uniform(-22, 22))
    shape, ground = _shape(rng, (x, y), radius=(10.0, 15.0)), _ground(rng)
    offsets = [step * (i - (count - 1) / 2) for i in range(count)]
    return tuple(_render(rng, [replace(shape, x=x + dx * o, y=y + dy * o)], ground) for o in offsets)


def _motion(rng: Rng) -> Drawing:
    move = _pick(rng, MOVES)
    return _moving(rng, move, int(rng.choice(FRAME_COUNTS))), move


KINDS = {
    "colour": Kind("1", ("What colour is the shape?", "What color is the shape?"), _colour),
    "shape": Kind("1", ("What shape is it?", "Which shape is in the picture?"), _name),
    "count": Kind("1", ("How many shapes are there?", "How many shapes are in the picture?"), _count),
    "place": Kind("1", ("Where is the shape?", "Where in the picture is the shape?"), _place),
    "more": Kind(
        "2", ("Which picture has more shapes?", "Are there more shapes in the first or the second picture?"), _more
    ),
    "motion": Kind("clip", ("Which way does the shape move?", "In which direction does the shape move?"), _motion),
}


@dataclass(frozen=True)
class Labelled:
    """A picture, what its cells hold (int64 [16], see `cells`), and an index into each of FACTS, -100 for none."""

    picture: Picture
    cells: NDArray[np.int64]
    facts: tuple[int, ...]


def labelled(rng: Rng) -> Labelled:
    """A picture of one shape, or, as often, of two to MOST shapes."""
    if rng.random() < 0.5:
        picture, one, place = _single(rng)
        names = (one.colour, one.name, place, "1")
        facts = tuple(list(options).index(name) for options, name in zip(FACTS, names, strict=True))
        return Labelled(picture, cells([one]), facts)
    picture, shapes = _several(rng, int(rng.integers(2, MOST + 1)))
    return Labelled(picture, cells(shapes), (-100, -100, -100, len(shapes) - 1))


def draw(rng: Rng, kind: str) -> Item:
    """Draw one item of a kind."""
    pictures, answer = KINDS[kind].draw(rng)
    prompt = _pick(rng, KINDS[kind].prompts)
    if KINDS[kind].layout == "clip":
        return Item(kind, prompt, answer, frames=pictures)
    return Item(kind, prompt, answer, images=pictures)


def draw_clip(rng: Rng, count: int) -> Item:
    """Draw a clip of `count` frames; `draw` makes those of FRAME_COUNTS."""
    move = _pick(rng, MOVES)
    return Item("motion", _pick(rng, KINDS["motion"].prompts), move, frames=_moving(rng, move, count))


def vocabulary() -> list[str]:
    """Every question and every word of the answers: what the tokenizer learns its merges from."""
    words = [*COLOURS, *OUTLINES, *PLACES, *MOVES, *COUNTS, "first", "second"]
    return [prompt for kind in KINDS.values() for prompt in kind.prompts] + words
