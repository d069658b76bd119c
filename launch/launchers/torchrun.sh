#!/usr/bin/env bash
# One host, torchrun:   RANKS=4 bash launch/launchers/torchrun.sh [CONFIG [key=value ...]]
# Several: the same on each, with NODES=2 NODE_RANK=0 (1, ...) MASTER_ADDR=<address of the first host>.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "${NODES:-1}" = 1 ]; then
    where=(--standalone)   # a free port on this host
else
    where=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
           --master-port "${MASTER_PORT:-29500}")
fi
exec torchrun "${where[@]}" --nproc-per-node "${RANKS:-4}" \
    "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
