#!/usr/bin/env bash
# Several hosts without ssh: the same command on each host, only NODE_RANK differs.
#   HOSTFILE=hosts MASTER_ADDR=<address of the first host> NODE_RANK=0 \
#       bash launch/launchers/two_hosts.sh [CONFIG [key=value ...]]
# HOSTFILE has a line a host, first host first:   hA slots=2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec deepspeed --hostfile "${HOSTFILE:?a file with a line a host: NAME slots=RANKS}" --no_ssh \
    --node_rank "${NODE_RANK:?0 on the first host of the hostfile, 1 on the next}" \
    --master_addr "${MASTER_ADDR:?an address of the first host that the others reach}" \
    --master_port "${MASTER_PORT:-29500}" "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
