#!/usr/bin/env bash
# One run of a sweep, for sweep_lib.sh: sweep_one.sh RUN; without RUN a Slurm job, which has its number in an array.
{ # bash reads a group as a whole: this file may be edited while a sweep goes on
    [ $# -gt 0 ] || [[ ${SLURM_ARRAY_TASK_ID:-} =~ ^[0-9]+$ ]] || { echo "error: name a run of the sweep" >&2; exit 2; }
    run=${1:-$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SWEEP_LEFT")}
    [ $# -gt 0 ] || export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    files=$SWEEP_OUTPUT/.sweep/$run
    [ -n "$run" ] && [ -e "$files.command" ] || { echo "error: there is no run '$run' in the sweep" >&2; exit 2; }
    exec 8>"$files.lock"
    flock -n 8 || { echo "error: '$run' is being done already" >&2; exit 0; }
    IFS=$'\x1f' read -r -d '' -a flags <"$files.command"
    read -ra gpus <<<"$SWEEP_GPUS"
    [[ ${SWEEP_SLOT:-0} =~ ^[0-9]+$ ]] || { echo "error: SWEEP_SLOT is not a number" >&2; exit 2; }
    [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SWEEP_SLOT % ${#gpus[@]}]}
    rm -f "$files.failed"
    touch "$files.running"
    code=0
    "$PYTHON" main_prune_train.py "${flags[@]}" --output-dir "$SWEEP_OUTPUT/$run" --resume auto >"$files.log" 2>&1 || code=$?
    [ "$code" = 0 ] || [ "$code" = 75 ] || touch "$files.failed" # 75: told to end, and has a checkpoint to go on from
    rm -f "$files.running"
    [ $# = 0 ] || code=0 # a run that fails stops no other; a Slurm job that fails says so
    exit "$code"
}
