#!/usr/bin/env bash
# mpirun of OpenMPI, MPICH or Intel MPI:   RANKS=4 bash launch/launchers/mpirun.sh [CONFIG [key=value ...]]
# Needs mpi4py that uses the same MPI. MPIRUN_ARGS: more of its options, e.g. "--hostfile FILE" (OpenMPI),
# "-hosts a,b -ppn 2" (MPICH, Intel MPI), "--oversubscribe" (OpenMPI: more ranks than cores).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read -ra more <<< "${MPIRUN_ARGS:-}"
exec "${MPIRUN:-mpirun}" -n "${RANKS:-4}" ${more[@]+"${more[@]}"} \
    "$PYTHON" "$ROOT/launch/generate.py" --config "$CONFIG" "${ARGS[@]}"
