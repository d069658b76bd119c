# Sourced by every script here. Sets ROOT, PYTHON, CONFIG and ARGS (the key=value overrides after it).
# $1 of a script: a config; default the demo. PYTHON: an interpreter with the packages of launch/requirements.txt.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || { echo "PYTHON=$PYTHON is not there" >&2; exit 2; }
bin=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)
PYTHON=$bin/$(basename "$PYTHON")
PATH=$bin:$PATH                                          # deepspeed, torchrun, mpirun, ninja of the same environment
CONFIG=$(realpath "${1:-$ROOT/configs/demo_tp4.yaml}")   # some launchers change directory
[ -z "${HOSTFILE:-}" ] || HOSTFILE=$(realpath "$HOSTFILE")
ARGS=("${@:2}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}        # cores per rank
