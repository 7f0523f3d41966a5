#!/usr/bin/env bash
# The table of the paper on CIFAR: two networks, two data sets, three sparsities, eight methods, three optimizers, three
# seeds: 864 runs. ARCHS ("resnet vgg"), DATASETS ("cifar10 cifar100"), OPTIMIZERS ("sgd sam samv2") and the settings below
# choose a part of it. It ends in OUTPUT_DIR/RESULTS.md, which needs requirements-analysis.txt. --dry-run measures a training
# step of each network here and says how long all runs would take.

set -euo pipefail
METHODS=${METHODS:-snip grasp synflow random set rigl mest lth} SPARSITIES=${SPARSITIES:-0.9 0.95 0.98}
# shellcheck source=scripts/sweep_lib.sh
source "$(dirname "$0")/sweep_lib.sh"
begin_sweep "$@"
requirements+=(requirements-analysis.txt) # for the table: missing, that is known before the runs
declare -A networks=([resnet]="--arch resnet --depth 32 --width 2" [vgg]="--arch vgg --depth 19")
declare -A optimizers=([sgd]="--optmzr sgd" [sam]="--optmzr sgd-sam" [samv2]="--optmzr sgd-sam --sam-v2")
read -r -d '' -a archs <<<"${ARCHS:-resnet vgg}" || true
read -r -d '' -a wanted <<<"${OPTIMIZERS:-sgd sam samv2}" || true
read -r -d '' -a datasets <<<"${DATASETS:-cifar10 cifar100}" || true
for arch in "${archs[@]}"; do
    for optimizer in "${wanted[@]}"; do
        [ -n "${networks[$arch]:-}" ] || stop "ARCHS are resnet and vgg, not '$arch'"
        [ -n "${optimizers[$optimizer]:-}" ] || stop "OPTIMIZERS are sgd, sam and samv2, not '$optimizer'"
        read -ra flags <<<"${networks[$arch]} ${optimizers[$optimizer]}"
        for dataset in "${datasets[@]}"; do
            add_arm "$dataset-$arch-$optimizer" --dataset "$dataset" "${flags[@]}"
        done
    done
done
failed=0
run_sweep || failed=1
if [ -n "$dry_run" ]; then
    listed=$(print_commands)
    set -- requirements.txt
    # shellcheck source=scripts/setup.sh
    source "$(dirname "$0")/setup.sh"
    "$PYTHON" -m benchmarks.estimate --gpus "$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))" <<<"$listed"
elif [ -z "${SWEEP_SLURM:-}" ]; then
    page=$("$PYTHON" -m analysis.paper_table "$output") && echo "$page" >"$output/RESULTS.md" && echo "$output/RESULTS.md"
fi
exit "$failed"
