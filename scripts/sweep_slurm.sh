#!/usr/bin/env bash
# A sweep as an array of Slurm jobs, JOBS of them at a time: sweep_slurm.sh scripts/sweep_NAME.sh ARGUMENT...
# Partition, time limit and GPUs by sbatch's own variables (SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_GPUS ...). A job that
# is preempted is queued again and goes on from its last checkpoint; submitted again, the sweep does what is left of it.
# Run the sweep's script itself at the end for the list of runs that failed.

set -euo pipefail
case ${1:-} in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *sweep_*.sh | *reproduce_*.sh) ;;
    *) echo "error: name the script of a sweep first, as in: bash $0 scripts/sweep_rho.sh --dataset digits" >&2; exit 2 ;;
esac
command -v sbatch >/dev/null || { echo "error: there is no sbatch here: run the sweep's script itself" >&2; exit 2; }
SWEEP_SLURM=yes exec bash "$@"
