#!/usr/bin/env bash
# Several hosts, the deepspeed launcher over an MPI or Slurm:
#   LAUNCHER=openmpi HOSTFILE=hosts bash launch/launchers/deepspeed_mpi.sh [CONFIG [key=value ...]]
# LAUNCHER: openmpi, mpich, impi or slurm. LAUNCHER_ARGS: options for its mpirun or srun; for OpenMPI at least
# "--mca btl_tcp_if_include <interface>" where the network is not eth0. MPI_PATH: where its mpirun is, if not on PATH.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
PATH="${MPI_PATH:+$MPI_PATH:}$PATH"
first=$(awk '$1 && $1 !~ /^#/ {print $1; exit}' "${HOSTFILE:?a file with a line a host: NAME slots=RANKS}")
exec deepspeed --hostfile "$HOSTFILE" --launcher "${LAUNCHER:?openmpi, mpich, impi or slurm}" \
    --launcher_args="${LAUNCHER_ARGS:-}" --no_ssh_check --force_multi \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
