#!/usr/bin/env bash
# Submit a sweep as an array of Slurm jobs, one for each run and JOBS of them at a time:
#
#     bash scripts/sweep_slurm.sh scripts/sweep_NAME.sh [ARGUMENT ...]
#
# sbatch takes partition, time limit and GPUs from its own variables (SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_GPUS).
# A preempted job is queued again and resumes from its last checkpoint. Submitted again, the sweep submits the runs that
# are not finished. At the end run scripts/sweep_NAME.sh itself: it lists the runs that failed.

set -euo pipefail
case ${1:-} in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" ;;
    *.sh) [ -f "$1" ] || { echo "error: there is no script '$1': name that of a sweep" >&2; exit 2; }; exec bash "$1" --slurm "${@:2}" ;;
    *) echo "error: name the script of a sweep first, as in: bash $0 scripts/sweep_rho.sh --dataset digits" >&2; exit 2 ;;
esac
