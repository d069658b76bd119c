#!/usr/bin/env bash
# Several hosts, started from one of them over ssh by pdsh:
#   HOSTFILE=hosts bash launch/launchers/ssh_hostfile.sh [CONFIG [key=value ...]]
# Variables the other hosts need (OMP_NUM_THREADS, GLOO_SOCKET_IFNAME, ...) go into ~/.deepspeed_env, NAME=value a line.
# -N: pdsh is not to begin each line with the name of its host.
# INCLUDE: some of the hosts or slots, e.g. "hA@hB:0,1". Needs pdsh here, and ssh without a password to every host.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"   # pdsh changes to the working directory on every host
exec deepspeed --hostfile "${HOSTFILE:?a file with a line a host: NAME slots=RANKS}" --include "${INCLUDE:-}" \
    --launcher_args=-N ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
