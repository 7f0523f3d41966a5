#!/usr/bin/env bash
# Train the paper's network at its full length on a GPU, several runs at a time, and add every finished run to results/.
# Launched again it goes on where it was interrupted, so that a study fits into calls of --minutes M. The list is in
# experiment/study_list.py; --help says what can be set, and --device cpu tries the script where there is no GPU.
#
# Runs share the GPU by NVIDIA's multi-process service, which this starts and stops; without it they take turns. With
# STUDY=study it trains the list of study.sh like that.
set -euo pipefail
from=$PWD
unset CDPATH PYTHONSAFEPATH
cd "$(dirname "$0")/.."
PYTHON=python3
found='from importlib.util import find_spec as f; import sys; sys.exit(not all(map(f, sys.argv[1:])))'
if ! python3 -c "$found" torch torchvision scipy tqdm tensorboard sklearn 2>/dev/null; then
    flags=("$@")
    set -- requirements.txt
    # shellcheck source=scripts/setup.sh
    source scripts/setup.sh
    set -- ${flags[@]+"${flags[@]}"}
fi

service() { # whether the runs are to share a GPU by the service
    local before='' word
    for word in "$@"; do
        case $before$word in
            --dry-run | --help | -h | --no-cuda | --device=cpu | --devicecpu) return 1 ;;
        esac
        before=''
        [ "$word" != --device ] || before=--device
    done
    command -v nvidia-cuda-mps-control >/dev/null
}

stop() {
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
    rm -rf "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
}

if service "$@"; then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d) # a service of our own
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    trap stop EXIT
    if ! nvidia-cuda-mps-control -d; then
        echo "note: NVIDIA's multi-process service does not start here: the runs take turns on the GPU" >&2
        stop
        trap - EXIT
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each run; torch reads it as it is imported
"$PYTHON" -m analysis.study study_gpu "$from" "$@" &
study=$! signalled=yes code=0
trap 'signalled=yes; kill -TERM "$study" 2>/dev/null || true' INT TERM HUP
while [ -n "$signalled" ]; do # a signal ends wait, not the study, which has checkpoints to write
    signalled='' code=0
    wait "$study" || code=$?
done
exit "$code"
