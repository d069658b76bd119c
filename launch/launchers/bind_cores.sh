#!/usr/bin/env bash
# One host, each rank on cores (and memory) of its own:
#   RANKS=2 bash launch/launchers/bind_cores.sh [CONFIG [key=value ...]]
# Needs numactl. DeepSpeed sets OMP_NUM_THREADS to the cores per rank. CORES: which ones, e.g. 0-15; default all.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec deepspeed --num_accelerators "${RANKS:-4}" --master_port "${MASTER_PORT:-29500}" \
    --bind_cores_to_rank ${CORES:+--bind_core_list "$CORES"} "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
