#!/usr/bin/env bash
# What N accelerators must show, on the demo checkpoint: one table, in markdown, for the README.
#   bash tests/gpu.sh [N]    ranks, default: all cards of this machine; without a card the same jobs on CPU, N default 2
#   PYTHON=venv/bin/python bash tests/gpu.sh    in an environment of yours (with flash-attn, say), whatever its releases
# Exit code 1 if a job failed. A job that does not apply to this machine says why.
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
if [ -n "${PYTHON:-}" ]; then
    bin=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)
    PYTHON=$bin/$(basename "$PYTHON"); export PATH="$bin:$PATH"   # ninja, and the ranks' python
else
    use_environment "$ROOT/launch/requirements.txt"
fi
cd "$ROOT"
exec "$PYTHON" -W ignore tests/gpu.py "$@"
