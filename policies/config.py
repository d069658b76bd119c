"""Reading a config.json for a family's page: fields by name, and the numbers that every family's decoder has.

Every error is a UserError that names the key, its value and what is needed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.errors import UserError
from policies.policy import Attention, Geometry

MOST_SIZE, MOST_LAYERS, MOST_HEADS = 2**31 - 1, 1024, 1024  # what is beyond is a mistake, and would take for ever
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class TextNumbers:
    """What config.json says of a dense text decoder. sizes: "vocab", "hidden", "q", "kv" and "mlp", in elements."""

    sizes: dict[str, int]
    attention: Attention
    layers: int
    tied: bool
    context: int


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under `key`, an empty one where there is none."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"config.json: {key!r} is {reprlib.repr(found)}; a mapping is needed")
    return found


def text_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text decoder's fields, which older files have at the top and newer ones under text_config."""
    return {**config, **section(config, "text_config")}


def integer(fields: Mapping[str, Any], key: str, default: int | None = None, least: int = 1,
            most: int = MOST_SIZE) -> int:
    """Return a whole number from `least` to `most`."""
    value = fields.get(key, default)
    if value is None:
        raise UserError(f"config.json: {key!r} is missing; no default fits every model, so state it")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; a positive whole number is needed")
    if value > most:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; {most} is the most that can be")
    return value


def indices(fields: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return a list of layer numbers, each once."""
    value = fields.get(key)
    numbers = value if isinstance(value, list | tuple) else [None]
    if not all(type(n) is int and 0 <= n < MOST_LAYERS for n in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; a list of layer numbers is needed, each once")
    return tuple(numbers)


def positive(fields: Mapping[str, Any], key: str) -> float:
    """Return a number above zero."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_SIZE:
        raise UserError(f"config.json: {key!r} is {reprlib.repr(value)}; a positive number is needed")
    return value


def read_text(config: Mapping[str, Any], context: int, head_dim: int | None = None,
              rotated: float = 1) -> TextNumbers:
    """Read the text decoder's numbers. context: the default of max_position_embeddings. head_dim: the default of that
    key; None where the family has none, and a head is hidden_size / num_attention_heads wide. rotated: the default of
    partial_rotary_factor, the share of a head that has positions."""
    text = text_section(config)
    hidden, heads = integer(text, "hidden_size"), integer(text, "num_attention_heads", most=MOST_HEADS)
    kv_heads = integer(text, "num_key_value_heads", most=MOST_HEADS)
    width = hidden // heads if head_dim is None else integer(text, "head_dim", head_dim)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise UserError(f"config.json: 'tie_word_embeddings' is {reprlib.repr(tied)}; true or false is needed")
    known_width = width if head_dim or hidden == heads * width else None
    _check_what_only_forward_reads(text, known_width, head_dim is not None, rotated)
    sizes = {"vocab": integer(text, "vocab_size"), "hidden": hidden, "q": heads * width, "kv": kv_heads * width,
             "mlp": integer(text, "intermediate_size")}
    return TextNumbers(sizes, Attention(heads, kv_heads, width), integer(text, "num_hidden_layers", most=MOST_LAYERS),
                       tied, integer(text, "max_position_embeddings", context))


def _check_what_only_forward_reads(text: Mapping[str, Any], head_dim: int | None, stated_head_dim: bool,
                                   rotated: float) -> None:
    """Fields that shard nothing, but that stop a model in its first forward, when every rank has long been loaded."""
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"  # the former since Transformers 5
    rope = section(text, name)
    stated = {key: value for key, value in {**text, **rope}.items() if value is not None}
    for key in stated.keys() & {"rms_norm_eps", "rope_theta", "partial_rotary_factor"}:
        positive(stated, key)
    for key in stated.keys() & set(TOKEN_IDS):
        integer(stated, key, least=0)
    parts = rope.get("mrope_section")
    if parts is None:
        raise UserError(f"config.json: {name}.mrope_section is missing; three whole numbers are needed")
    whole = isinstance(parts, list | tuple) and all(type(n) is int and n >= 0 for n in parts)
    if not whole or len(parts) != 3:
        raise UserError(f"config.json: {name}.mrope_section is {reprlib.repr(parts)}; three whole numbers are needed")
    share = stated.get("partial_rotary_factor", rotated) if rotated != 1 else 1
    if head_dim and head_dim % 2 == 0 and 2 * sum(parts) != (turned := int(head_dim * share)):
        origin = "" if stated_head_dim else " (hidden_size / num_attention_heads)"
        of = "" if share == 1 else f", of which partial_rotary_factor {share} is rotated,"
        raise UserError(f"config.json: {name}.mrope_section {parts} has a sum of {sum(parts)}; head_dim {head_dim}"
                        f"{origin}{of} needs {turned // 2}")


def unstated(config: Mapping[str, Any], text_defaults: Mapping[str, Any], vision_defaults: Mapping[str, Any],
             aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys that a person left out of config.json, with the defaults that stand in.

    What a release of Transformers wrote has its number under transformers_version. Some releases leave out each vision
    key that has its default, so a file where another one is stated with its default has been changed since.
    aliases: vision keys -> other spellings of them.
    """
    text, vision = text_section(config), section(config, "vision_config")
    found: dict[str, Any] = {}
    by_transformers = "transformers_version" in text
    if not by_transformers:
        found = {key: value for key, value in text_defaults.items() if key not in text}
    missing = {key: value for key, value in vision_defaults.items()
               if key not in vision and aliases.get(key) not in vision}
    kept = [key for key in vision_defaults if key not in aliases and vision.get(key) == vision_defaults[key]]
    if kept or not by_transformers:
        found |= {f"vision_config.{key}": value for key, value in missing.items()}
    return found


def problems_of_heads(g: Geometry, tp_size: int, vision_width: str, shared: Sequence[str],
                      stated_head_dim: bool = False) -> list[str]:
    """Every constraint that this geometry or tp_size violates, each a sentence with the numbers. Empty when it can run.

    vision_width: the key of vision_config for the encoder's hidden size. shared: dimensions that are cut by grains.
    stated_head_dim: whether the text decoder's is a key of its own, and not hidden_size / num_attention_heads.
    """
    text, vision, found = g.attention["text"], g.attention["vision"], []
    if not 1 <= tp_size <= text.q_heads:
        found.append(f"tp_size {tp_size}: each rank needs a query head and there are {text.q_heads}")
    if not stated_head_dim and text.q_heads * text.head_dim != g.sizes["hidden"]:
        found.append(f"hidden_size {g.sizes['hidden']} is not a multiple of num_attention_heads {text.q_heads}")
    elif text.head_dim % 2:
        origin = "" if stated_head_dim else f" (hidden_size {g.sizes['hidden']} / {text.q_heads} heads)"
        found.append(f"head_dim {text.head_dim}{origin} is not even, which its rotary embedding needs")
    if text.q_heads % text.kv_heads:
        found.append(f"num_attention_heads {text.q_heads} is not a multiple of num_key_value_heads {text.kv_heads}")
    if vision.q_heads * vision.head_dim != g.sizes["v_hidden"]:
        found.append(f"vision {vision_width} {g.sizes['v_hidden']} is not a multiple of num_heads {vision.q_heads}")
    elif vision.head_dim % 4:
        found.append(f"vision head_dim {vision.head_dim} ({vision_width} {g.sizes['v_hidden']} / {vision.q_heads} "
                     "heads) is not a multiple of 4, which its rotary embedding needs")
    found += [f"tp_size {tp_size}: {name} has only {g.sizes[name]} elements to share"
              for name in shared if g.sizes[name] < tp_size]
    return found
