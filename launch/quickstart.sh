#!/usr/bin/env bash
# Four ranks look at pictures and answer questions, and one process checks them. Needs Python 3.10 or later, nothing else:
#   bash launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "$ROOT/launch/requirements.txt"
cd "$ROOT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # four ranks share the cores
config=configs/demo_tp4.yaml

echo "one process, plain Transformers ..." >&2
"$PYTHON" launch/one_process.py --config $config > "$work/one.jsonl" || true   # wrong answers are shown below
echo "four ranks, deepspeed launcher (the first start compiles two shared-memory ops, about 40 s) ..." >&2
"$PYTHON" -m deepspeed.launcher.runner --quiet --num_accelerators 4 --master_port "$(free_port)" \
    launch/generate.py --config $config > "$work/four.jsonl" || true
"$PYTHON" launch/compare.py --config $config --one "$work/one.jsonl" --many "$work/four.jsonl"
