# shellcheck shell=bash
# Sourced by the sweeps: their settings, and the runner behind them.
#
# A sweep calls begin_sweep "$@", then add_arm NAME FLAG... for each of its arms, then run_sweep. Every arm becomes a run
# for each method, sparsity and seed, in a directory of its own. Runs are done JOBS at a time by xargs; what has a
# result.json is left alone and what was interrupted goes on, so that launching a sweep again finishes it.

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    cat <<'EOF2'

settings, in the environment; lists are separated by spaces:
  METHODS      pruning methods (random; none for a dense network)
  SPARSITIES   (0.9)
  RHOS         of SAM
  SEEDS        (0 1 2)
  EPOCHS       (160)
  JOBS         runs at a time; the cores are shared out between them (1)
  GPUS         numbers of the GPUs to spread them over; several runs may share one (all runs see all GPUs)
  OUTPUT_DIR   (runs/ and the name of the sweep)

options: --dry-run prints the commands and their number; --help; every other argument goes to main_prune_train.py
(a relative --data-dir or --pretrained made absolute).
Needs bash 4.4, GNU coreutils and findutils, and flock.
EOF2
}

begin_sweep() { # begin_sweep ARGUMENT...: read the command line and the environment
    name=$(basename "$0" .sh) dry_run='' extra=() jobs=() requirements=(requirements.txt)
    local previous=''
    [[ $* != *$'\x1f'* ]] || stop "arguments cannot hold the character 0x1f"
    while [ $# -gt 0 ]; do
        case ${1%%=*} in
            -h | --help) usage; exit 0 ;;
            --dry-run) dry_run=yes ;;
            --prune-method | --sparsity | --optmzr | --sam-rho | --seed | --epochs | --output-dir | --resume)
                stop "${1%%=*} is the sweep's to set: say it by a setting of the environment (--help lists them)" ;;
            --sparsity-config)
                stop "a sweep goes over SPARSITIES, of which --sparsity-config leaves no choice: leave it out" ;;
            *) case $previous=$1 in # paths are the caller's, and runs start in another directory
                    --data-dir=* | --pretrained=*) extra+=("$(realpath -m -- "$1")") ;;
                    *=--data-dir=* | *=--pretrained=*)
                        extra+=("${1%%=*}=$(realpath -m -- "${1#*=}")") ;;
                    *) extra+=("$1") ;;
                esac ;;
        esac
        previous=$1
        shift
    done
    read -r -d '' -a methods <<<"${METHODS:-random}" || true
    read -r -d '' -a sparsities <<<"${SPARSITIES:-0.9}" || true
    read -r -d '' -a seeds <<<"${SEEDS:-0 1 2}" || true
    read -r -d '' -a gpus <<<"${GPUS:-}" || true
    epochs=${EPOCHS:-160} at_a_time=${JOBS:-1} output=${OUTPUT_DIR:-runs/$name}
    local list
    for list in "$epochs" "$at_a_time" "${seeds[@]}" "${gpus[@]}"; do
        [[ $list =~ ^[0-9]+$ ]] || stop "EPOCHS, JOBS, SEEDS and GPUS are whole numbers, not '$list'"
    done
    at_a_time=$((10#$at_a_time)) # or 08 would be octal
    [ "$at_a_time" -gt 0 ] || stop "JOBS has to be at least 1"
    output=$(realpath -m -- "$output")
}

stop() { echo "error: $1" >&2; exit 2; }

add_arm() { # add_arm NAME FLAG...: runs with these flags for every method, sparsity and seed
    local arm=$1 method sparsity seed run flag given
    shift
    for flag in "$@"; do
        for given in "${extra[@]}"; do
            [[ $flag != --* || ${given%%=*} != "$flag" ]] ||
                stop "$flag is what an arm of this sweep sets, and others may not: leave it out"
        done
    done
    for method in "${methods[@]}"; do
        for sparsity in "${sparsities[@]}"; do
            local sparse=(--prune-method "$method" --sparsity "$sparsity") where=$method-$sparsity
            if [ "$method" = none ]; then
                [ "$sparsity" = "${sparsities[0]}" ] || continue # a dense network has one sparsity
                sparse=(--prune-method none) where=dense
            fi
            for seed in "${seeds[@]}"; do
                run=$(tr -c 'A-Za-z0-9._\n-' _ <<<"$where-$arm-seed$seed")
                [ -z "${commands[$run]:-}" ] || continue # a value that is listed twice
                [[ "${sparse[*]} $*" != *$'\x1f'* ]] || stop "settings cannot hold the character 0x1f"
                jobs+=("$run")
                commands["$run"]=$(join "${sparse[@]}" "$@" --seed "$seed" --epochs "$epochs" "${extra[@]}")
            done
        done
    done
}
declare -A commands=()

join() { printf '%s\x1f' "$@"; } # by a character that no flag has; no shell ever reads flags as code

run_sweep() { # do what is left of the sweep; 1 if a run failed
    [ "${#jobs[@]}" -gt 0 ] || stop "there is nothing to run: a setting is white space alone"
    if [ -n "$dry_run" ]; then
        print_commands
        return
    fi
    set -- "${requirements[@]}"
    # shellcheck source=scripts/setup.sh
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
    mkdir -p "$output/.sweep" || stop "OUTPUT_DIR: cannot write to '$output'"
    exec 9>"$output/.sweep/lock" # held by every run too
    flock -n 9 || stop "a sweep is at work in '$output': wait for it, end it, or give another OUTPUT_DIR"
    find_left
    began=$SECONDS finished=$((${#jobs[@]} - ${#left[@]}))
    echo "$output: ${#jobs[@]} runs, $finished of them finished already"
    export PYTHON SWEEP_OUTPUT=$output
    if [ "${#left[@]}" -gt 0 ]; then
        if [ -n "${SWEEP_SLURM:-}" ]; then
            submit_left
            return
        fi
        run_left
    fi
    report
}

print_commands() {
    local run flags
    for run in "${jobs[@]}"; do
        IFS=$'\x1f' read -r -d '' -a flags < <(printf %s "${commands[$run]}") || true
        flags+=(--output-dir "$output/$run" --resume auto)
        printf '%s main_prune_train.py%s\n' "${PYTHON:-python}" "$(printf ' %q' "${flags[@]}")"
    done
    echo "${#jobs[@]} runs"
}

find_left() { # set `left` to the runs without a result, and write down the flags of all for sweep_one.sh
    local run before
    for run in "${jobs[@]}"; do
        [ -e "$output/$run" ] && [ -e "$output/.sweep/$run.command" ] || continue
        before=$(<"$output/.sweep/$run.command")
        if [ "${before%$'\x1f'}" != "${commands[$run]%$'\x1f'}" ]; then # which earlier versions did not write at the end
            stop "'$output/$run' was begun with other flags: give another OUTPUT_DIR, or delete it"
        fi
    done
    left=()
    for run in "${jobs[@]}"; do
        [ -e "$output/$run/result.json" ] || left+=("$run")
        printf '%s' "${commands[$run]}" >"$output/.sweep/$run.command"
    done
}

run_left() { # on this machine
    rm -f "$output"/.sweep/*.{running,failed}
    local cores
    cores=$(nproc)
    export SWEEP_GPUS="${gpus[*]}" OMP_NUM_THREADS=$((cores > at_a_time ? cores / at_a_time : 1))
    set -m # a process group of its own, so that all of it can be ended
    printf '%s\0' "${left[@]}" |
        xargs -0 -n 1 -P "$at_a_time" --process-slot-var=SWEEP_SLOT bash scripts/sweep_one.sh &
    group=$(jobs -p %+)
    set +m
    trap 'kill -TERM -- "-$group" 2>/dev/null; wait; echo; echo "interrupted: launch again to go on" >&2; exit 130' INT TERM HUP
    while kill -0 -- "-$group" 2>/dev/null; do
        show_progress
        sleep 1
    done
    wait || true
    show_progress
    trap - INT TERM HUP
    [ ! -t 1 ] || echo
}

submit_left() { # as an array of Slurm jobs, one a run, with what SBATCH_* variables say of partition, time and GPUs
    local list
    list=$(mktemp "$output/.sweep/left.XXXXXX") # its own: jobs of an earlier array still look into theirs
    printf '%s\n' "${left[@]}" >"$list"
    flock -u 9
    export SWEEP_GPUS='' SWEEP_LEFT=$list # not by sbatch's own list, in which a comma parts variables
    sbatch --job-name="$name" --array="0-$((${#left[@]} - 1))%$at_a_time" --requeue --open-mode=append \
        --output="$output/.sweep/slurm-%A_%a.log" --export=ALL scripts/sweep_one.sh
}

report() { # list the runs that have no result; 1 if there are any
    local run failed=0
    for run in "${jobs[@]}"; do
        [ ! -e "$output/$run/result.json" ] || continue
        failed=$((failed + 1))
        echo "failed: $run ($output/.sweep/$run.log)" >&2
        tail -n 3 "$output/.sweep/$run.log" 2>/dev/null | sed 's/^/    /' >&2
    done
    echo "$((${#jobs[@]} - failed)) of ${#jobs[@]} runs finished, $failed failed"
    [ "$failed" = 0 ]
}

finished_runs() { local paths=("${jobs[@]/#/"$output/"}"); count "${paths[@]/%//result.json}"; }

count() { # count PATTERN...: how many such files there are
    local file number=0
    for file; do [ ! -e "$file" ] || number=$((number + 1)); done
    echo "$number"
}

last_line=
show_progress() { # a line that says how far the sweep is: in place on a terminal, else whenever it changes
    local total=${#jobs[@]} complete failed running line spent=$((SECONDS - began)) rest=''
    complete=$(finished_runs) failed=$(count "$output"/.sweep/*.failed)
    running=$(count "$output"/.sweep/*.running)
    line="$complete done, $running running, $failed failed of $total"
    local now=$((complete + failed - finished))
    if [ "$now" -gt 0 ]; then
        rest=$(((total - complete - failed) * spent / now))
        rest=$(printf ', %d:%02d:%02d left' $((rest / 3600)) $((rest / 60 % 60)) $((rest % 60)))
    fi
    if [ -t 1 ]; then
        printf '\r%s%s\033[K' "$line" "$rest"
    elif [ "$line" != "$last_line" ]; then
        echo "$line$rest"
    fi
    last_line=$line
}
