#!/usr/bin/env bash
# One run of a sweep, for sweep_lib.sh: sweep_one.sh RUN; as a Slurm job the run whose number in the array it has.
run=${1:-$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SWEEP_OUTPUT/.sweep/left")}
files=$SWEEP_OUTPUT/.sweep/$run
IFS=$'\x1f' read -r -d '' -a flags <"$files.command"
read -ra gpus <<<"$SWEEP_GPUS"
[ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SWEEP_SLOT % ${#gpus[@]}]}
touch "$files.running"
"$PYTHON" main_prune_train.py "${flags[@]}" >"$files.log" 2>&1 || touch "$files.failed"
rm -f "$files.running"
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [ ! -e "$files.failed" ] # else 0: a run that fails stops no other
