"""Malformed checkpoints: headers, indexes and config.json, written by hand and mutated by seed. The message names the
file, and the tensor or field; nothing is loaded, because nothing may be that would then turn out wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

SINGLE, INDEX, FIRST, SECOND = ("model.safetensors", "model.safetensors.index.json",
                                "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, MLP, QKV = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight", "visual.blocks.0.attn.qkv.weight"
Header = dict[str, Any]


def parts(file: Path) -> tuple[Header, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: Header | bytes, body: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


# Mutations by seed, and by position

def layout(file: Path) -> dict[str, tuple] | None:
    """What the safetensors package makes of a file; None where it refuses it."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError):
        return None


def flip(raw: bytearray, rng: random.Random, length: int) -> None:
    raw[rng.randrange(8, 8 + length)] ^= 1 << rng.randrange(8)


def scramble(raw: bytearray, rng: random.Random, length: int) -> None:
    at, count = rng.randrange(8, length - 20), rng.randrange(2, 40)
    raw[at : at + count] = rng.randbytes(count)


def cut_out(raw: bytearray, rng: random.Random, length: int) -> None:
    at = rng.randrange(8, length - 20)
    del raw[at : at + rng.randrange(1, 20)]


def repeat(raw: bytearray, rng: random.Random, length: int) -> None:
    at, count = rng.randrange(8, length - 60), rng.randrange(1, 60)
    raw[at:at] = raw[at : at + count]


def digit(raw: bytearray, rng: random.Random, length: int) -> None:
    at = rng.choice([i for i in range(8, 8 + length) if chr(raw[i]).isdigit()])
    raw[at] = ord(rng.choice(sorted(set("0123456789") - {chr(raw[at])})))


MUTATIONS = [(how, seed) for how in (flip, scramble, cut_out, repeat, digit) for seed in range(16)]
CUTS = [0, 1, 7, 8, 9, 40, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -100, -8, -1]  # bytes, fractions, or bytes from the end


@pytest.mark.parametrize(("how", "seed"), MUTATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_a_mutated_header(refuse, how, seed):
    """Mutations that leave every name, type and shape as it was, of which safetensors says so too, are drawn again."""
    def change(model: Path) -> None:
        file, rng = model / SINGLE, random.Random(seed)
        sound, before = file.read_bytes(), layout(file)
        while layout(file) == before:
            raw = bytearray(sound)
            how(raw, rng, int.from_bytes(sound[:8], "little"))
            file.write_bytes(raw)

    refuse(change, [SINGLE])


@pytest.mark.parametrize("at", CUTS)
def test_a_file_cut_short(refuse, at):
    def change(model: Path) -> None:
        size = (model / SINGLE).stat().st_size
        os.truncate(model / SINGLE, int(at * size) if isinstance(at, float) else at if at >= 0 else size + at)

    refuse(change, [SINGLE, "truncated"])


@pytest.mark.parametrize("lie", ["0", "1", "length - 1", "length + 1", "length + 8", "size", "size - 7", "2**31",
                                 "2**63 - 1", "2**64 - 1", "100_000_000", "100_000_001"])
def test_a_header_that_lies_about_its_length(refuse, lie):
    def change(model: Path) -> None:
        raw = (model / SINGLE).read_bytes()
        length = eval(lie, {"length": int.from_bytes(raw[:8], "little"), "size": len(raw)})
        (model / SINGLE).write_bytes(length.to_bytes(8, "little") + raw[8:])

    refuse(change, [SINGLE])


# One entry of the header

BIG = 10**400
ENTRIES: list[tuple[str, Any, list[str]]] = [  # field of MLP's entry, its value, words besides the tensor's name
    *(("dtype", value, [str(value)]) for value in ("F33", "f32", "", "float32", "F8_E4M3", "I64", "I32", "U8", "BOOL")),
    *(("dtype", value, ["header entry"]) for value in (None, 5, ["F32"], {"F32": 1}, True)),
    ("dtype", "F16", ["do not hold"]), ("dtype", "F64", ["do not hold"]),
    *(("shape", value, ["do not hold"]) for value in ([], [40], [24, 40, 2], [0], [40, 25], [1], [BIG % 2**62, 9],
                                                       [2**31, 2**31], [2**32, 2**32, 2**32], [2**62, 0, 2**62])),
    *(("shape", value, ["header entry"]) for value in (None, 960, "40x24", {"40": 24}, [[40, 24]], [40.0, 24.0],
                                                       [True, 960], [None, 24], [-40, -24], [2**63, 1], [BIG, 1],
                                                       [1] * 100_000 + [960], [2**62] * 100_000)),
    ("shape", [24, 40], ["has shape [24, 40]", "config.json says [40, 24]"]),
    ("shape", [960], ["has shape [960]"]), ("shape", [8, 120], ["has shape [8, 120]"]),
    ("shape", [1, 40, 24], ["has shape [1, 40, 24]"]), ("shape", [40, 24] + [1] * 4, ["has shape"]),
    *(("data_offsets", value, ["header entry"]) for value in (None, 0, "0:3840", [], [0], [0, 1, 2], ["0", "3840"],
                                                              [0.0, 3840.0], [-3840, 0], [None, None], {"0": 1},
                                                              [False, True], [0, BIG], [BIG, BIG])),
    *(("data_offsets", value, ["do not hold"]) for value in ([0, 0], [3840, 0], [0, 3839], [0, 2**63 - 1])),
    *(("data_offsets", value, []) for value in ([0, 3840], [1, 3841], [2**62, 2**62 + 3840], [10**9, 10**9 + 3840])),
]


@pytest.mark.parametrize("number", range(len(ENTRIES)))
def test_an_entry_of_the_header(refuse, number):
    field, value, words = ENTRIES[number]

    def change(model: Path) -> None:
        header, body = parts(model / SINGLE)
        header[MLP][field] = value
        write(model / SINGLE, header, body)

    refuse(change, [SINGLE, "tensor '", *([MLP, *words] if words else [])])


ODD_ENTRIES = [None, 5, "F32", [], ["F32", [1], [0, 4]], {}, {"dtype": "F32"}, {"shape": [1]},
               {"dtype": "F32", "shape": [1]}]


@pytest.mark.parametrize("entry", ODD_ENTRIES, ids=str)
def test_an_entry_that_is_none(refuse, entry):
    def change(model: Path) -> None:
        header, body = parts(model / SINGLE)
        write(model / SINGLE, header | {MLP: entry}, body)

    refuse(change, [SINGLE, MLP, "header entry"])


# Names

def rename(new: str | None, old: str = MLP):
    """The same bytes under another name, or of no tensor (a hole)."""
    def change(header: Header) -> Header:
        return {(new if name == old else name): e for name, e in header.items() if name != old or new is not None}
    return change


def twins(a: str, b: str):
    """Two tensors exchange their bytes."""
    return lambda header: header | {a: header[b], b: header[a]}


NAMES: dict[str, tuple[Callable[[Header], Header], list[str]]] = {
    "a hole": (rename(None), ["begins at byte"]),
    "empty": (rename(""), ["''", "not part of", MLP, "missing"]),
    "a blank more": (rename(MLP + " "), [f"{MLP} '", "not part of", "missing"]),
    "a newline": (rename(MLP + "\n"), ["\\n", "not part of", "missing"]),
    "another case": (rename(MLP.upper()), [MLP.upper(), "not part of", "missing"]),
    "a letter that looks the same": (rename(MLP.replace("a", "а")), ["not part of", "missing"]),
    "NUL": (rename(MLP + "\0"), ["\\x00", "not part of", "missing"]),
    "half a surrogate": (rename("\ud800"), ["\\ud800", "not part of", "missing"]),
    "10,000 letters": (rename("x" * 10_000), ["10000 characters"]),
    "a prefix": (rename("module." + MLP), ["'module.", "not part of", "missing"]),
    "a layer too high": (rename("model.layers.1.mlp.gate_proj.weight"), ["layers.1", "not part of", "layers.0"]),
    "a layer below zero": (rename("model.layers.-1.mlp.gate_proj.weight"), ["layers.-1", "not part of", "layers.0"]),
    "a layer with a zero": (rename("model.layers.00.mlp.gate_proj.weight"), ["layers.00", "not part of", "layers.0."]),
    "a bias for a weight": (rename(MLP.replace("weight", "bias")), ["bias", "not part of", "missing"]),
    "a text MLP in the vision encoder": (rename("visual.blocks.0.mlp.gate_proj.weight"), ["not part of", "missing"]),
    "quantised": (rename(MLP.replace("weight", "qweight")), ["qweight", "not part of", "missing"]),
    "LoRA": (rename(MLP.replace("weight", "lora_A.weight")), ["lora_A", "not part of", "missing"]),
    "two names of one": (lambda h: {**h, "model.language_model.norm.weight": h[NORM]}, []),
    "two exchanged": (twins("model.norm.weight", "model.embed_tokens.weight"), ["has shape"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(refuse, case):
    change_header, words = NAMES[case]

    def change(model: Path) -> None:
        header, body = parts(model / SINGLE)
        write(model / SINGLE, change_header(header), body)

    refuse(change, [SINGLE, *words])


# Files that are something else

def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133\n")


def loop(path: Path) -> None:
    path.symlink_to(path)


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


INSTEAD: dict[str, Callable[[Path], None]] = {
    "a directory": Path.mkdir,
    "a fifo": os.mkfifo,
    "a loop of links": loop,
    "a dangling link": lambda path: path.symlink_to("gone"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "nothing in it": Path.touch,
    "a terabyte of holes": holes,
    "a git-lfs pointer": pointer,
    "HTML": lambda path: path.write_text("<!DOCTYPE html><html>Entry not found</html>"),
    "a zip file": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "GGUF": lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100)),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x0f\0\0\0\0\0\0\0\x8c\x02os\x8c\x06system\x93."),
    "nulls": lambda path: path.write_bytes(bytes(1000)),
    "text": lambda path: path.write_text("weights"),
    "a list": lambda path: path.write_text("[]"),
    "JSON cut off": lambda path: path.write_text('{"weight_map": {"model.norm'),
    "a deep nest": lambda path: path.write_text('{"a":' * 100_000),
    "UTF-16": lambda path: path.write_bytes('{"weight_map": {}}'.encode("utf-16")),
    "a long number": lambda path: path.write_text('{"weight_map": ' + "9" * 5000 + "}"),
}
INDEXES = {"null": "null", "empty": '{"weight_map": null}', "a list": '{"weight_map": []}',
           "text": '{"weight_map": "x"}', "another key": '{"weights": {}}', "trailing": '{"weight_map": {}} {}',
           "a comment": '{"weight_map": {} /* */}'}
TARGETS = {"above": "../x.safetensors", "absolute": "/etc/passwd", "a directory down": "a/b.safetensors", "nothing": "",
           "itself": ".", "the parent": "..", "not there": "model-00003-of-00002.safetensors", "NUL": "a\0b",
           "the config": "config.json", "the index": INDEX, "a device": "/dev/zero", "a long name": "x" * 5000,
           "a number": 5, "null": None, "a list": ["a"], "a mapping": {"a": 1}, "half a surrogate": "\udcff"}


@pytest.mark.parametrize("file", [SINGLE, "config.json", SECOND, INDEX])
@pytest.mark.parametrize("what", INSTEAD)
def test_another_thing_instead_of_a_file(refuse, file, what):
    def change(model: Path) -> None:
        (model / file).unlink()
        INSTEAD[what](model / file)

    refuse(change, [file], files=2 if file in (SECOND, INDEX) else 1)


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_without_a_map(refuse, what):
    refuse(lambda model: (model / INDEX).write_text(INDEXES[what]) and None, [INDEX, "cannot be read"], files=2)


@pytest.mark.parametrize("target", TARGETS)
def test_an_index_that_leads_elsewhere(refuse, target):
    def change(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][NORM] = TARGETS[target]
        (model / INDEX).write_text(json.dumps(index))

    refuse(change, [ascii(str(TARGETS[target])[:40])[1:-1].split("\\")[0]], files=2)


def test_a_tensor_in_both_files(refuse):
    def change(model: Path) -> None:
        shutil.copy(model / FIRST, model / SECOND)

    refuse(change, [SECOND, "is also in", FIRST, "does not hold it"], files=2)


def test_there_are_enough_of_them():
    counts = [len(cases) for cases in (MUTATIONS, CUTS, ENTRIES, ODD_ENTRIES, NAMES, INDEXES, TARGETS)]
    assert sum(counts) + 4 * len(INSTEAD) >= 200
