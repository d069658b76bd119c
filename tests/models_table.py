"""Every family in every form of its files, over ranks, held against one process: the table of docs/models.md.

    python tests/models_table.py                  small random models in float32, some three minutes on two cores
    python tests/models_table.py --tp 2,8 --family qwen3_vl
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "parity"))

import peft
import torch
from checkpoints import make_checkpoint, newer_name
from families import make_family, transpose_experts
from forking import stop_servers
from launching import launch
from loras import linears, make_lora
from quantised import KINDS, quantised
from safetensors.torch import load_file, save_file
from worker import load

from adapter.checkpoint.safetensors import read_config
from policies.registry import POLICIES, policy_for

WORKER = Path(__file__).resolve().parent / "parity" / "worker.py"
CASE = "batch"  # text, images and a video in one, padded
QUANTISED = {"AWQ": "awq", "GPTQ, 4 bits": "gptq4", "GPTQ, 8 bits": "gptq8", "FP8": "fp8"}
OWN_LOOP = "Transformers' own loop"
Form = tuple[str, Path, Path, tuple[str, ...]]  # its name, the files, the model in one process, options of the ranks


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tp", default="2,3,8", help="tp sizes, with commas between them")
    p.add_argument("--family", choices=sorted(POLICIES), help="only this one")
    args = p.parse_args()
    sizes, wrong = [int(size) for size in args.tp.split(",")], 0
    print("| family | since | form | " + " | ".join(f"tp {n}" for n in sizes) + " | tokens | decoded by |")
    print("|---|---|---|" + "---|" * len(sizes) + "---|---|")
    with tempfile.TemporaryDirectory() as home:
        for family in [args.family] if args.family else sorted(POLICIES):
            for form in forms(Path(home) / family, family):
                cells, equal, loop = row(Path(home) / "out", form, sizes)
                wrong += not equal
                print(f"| `{family}` | {POLICIES[family].first_release} | {form[0]} | {' | '.join(cells)} | "
                      f"{'equal' if equal else '**differ**'} | {loop} |", flush=True)
    stop_servers()
    sys.exit(1 if wrong else 0)


def forms(home: Path, family: str) -> Iterator[Form]:
    """The same small model in each form that this family is read in."""
    home.mkdir()
    wide = {"intermediate_size": 208}
    dense = make_checkpoint(home / "dense") if family == "qwen2_vl" else make_family(home / "dense", family, **wide)
    if (decoder := policy_for(read_config(dense)).decoder) and decoder.experts:
        published = Path(shutil.copytree(dense, home / "published"))
        transpose_experts(published)
        yield "dense", dense, dense, ()
        yield "dense, as published, `experts: expert`", published, dense, ("--experts", "expert")
        return
    yield "dense", dense, dense, ()
    tensors = {name: tuple(t.shape) for file in dense.glob("*.safetensors") for name, t in load_file(file).items()}
    rename = newer_name if family in ("qwen2_vl", "qwen2_5_vl") else str  # as PEFT finds the modules in memory
    lora = make_lora(home / "lora", linears(tensors), rename=rename, lora_alpha=0.5)
    yield "LoRA", dense, merged(dense, lora, home / "merged"), ("--adapters", str(lora))
    for name, kind in QUANTISED.items():
        meant = home / f"{kind}-meant"
        yield name, quantised(dense, home / kind, KINDS[kind], decoded=meant), meant, ()


def merged(dense: Path, lora: Path, out: Path) -> Path:
    """The model with an adapter merged by PEFT, saved under the names of `dense`."""
    names = {name: file for file in dense.glob("*.safetensors") for name in load_file(file)}
    policy, model = policy_for(read_config(dense)), load(dense)
    weights = peft.PeftModel.from_pretrained(model, lora).merge_and_unload().state_dict()
    published = {policy.published(name): tensor for name, tensor in weights.items()}
    shutil.copytree(dense, out)
    for file in set(names.values()):
        save_file({name: published[policy.published(name)].contiguous() for name in load_file(file)}, out / file.name,
                  {"format": "pt"})
    return out


def row(out: Path, form: Form, sizes: list[int]) -> tuple[list[str], bool, str]:
    """The largest logit difference at each tp size, as a share of the largest logit; whether all tokens are equal; by
    whose loop they were decoded."""
    _, files, whole, options = form
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    run = ("--only", CASE, "--out", str(out))
    reference = launch(1, WORKER, "--plain", *run, str(whole), launcher="alone")
    assert reference.code == 0, reference.err[-3000:]
    plain = load_file(out / f"{whole.name}.plain.safetensors")
    cells, equal, loops = [], True, set()
    for tp in sizes:
        outcome = launch(tp, WORKER, *options, *run, str(files))
        assert outcome.code == 0, outcome.err[-5000:]
        ours = load_file(out / f"{files.name}.tp{tp}.safetensors")
        logits = plain[f"{CASE}.logits"]
        cells.append(f"{float((logits - ours[f'{CASE}.logits']).abs().max() / logits.abs().max()):.1e}")
        equal &= torch.equal(plain[f"{CASE}.tokens"], ours[f"{CASE}.tokens"])
        loops.add("Transformers" if OWN_LOOP in outcome.err else "our loop")
    return cells, equal, ", ".join(sorted(loops))


if __name__ == "__main__":
    main()
