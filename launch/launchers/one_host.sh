#!/usr/bin/env bash
# One host, the deepspeed launcher:   RANKS=4 bash launch/launchers/one_host.sh [CONFIG [key=value ...]]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec deepspeed --num_accelerators "${RANKS:-4}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
