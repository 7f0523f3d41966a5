#!/usr/bin/env bash
# ResNet-50 on ImageNet, 80 and 90% sparse: SGD against one-step SAM, on all GPUs of this machine. A run that was ended goes
# on from where it was when this is launched again.
#
# usage: bash scripts/imagenet.sh DIR [--dry-run] [flags of main_prune_train.py, which replace those below]
#   DIR        has train/<class>/* and val/<class>/*
#   --dry-run  prints the commands, and what they would compute
#
# environment: EPOCHS="90 150" SPARSITIES="0.8 0.9" OPTIMIZERS="sgd samv2" METHOD=random SEEDS="0 1 2" PROCESSES=(all GPUs)
#   OUTPUT_DIR=runs/imagenet IMAGES_PER_SECOND=(of all GPUs together, with SGD: with it --dry-run prints hours)
set -euo pipefail
unset CDPATH PYTHONSAFEPATH # they would send cd elsewhere, and hide the packages of this directory
here=$(cd "$(dirname "$0")/.." && pwd)
case ${1:-} in
    '' | -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    -*) echo "error: name the directory of ImageNet first: bash scripts/imagenet.sh DIR" >&2; exit 2 ;;
esac
data=$(realpath -m "$1") dry=
shift
[ -d "$data/train" ] || { echo "error: there is no '$data/train': name the directory that has train/<class>/*" >&2; exit 2; }
flags=() network=(--arch resnet --depth 50 --stem imagenet)
for word in "$@"; do
    if [ "$word" = --dry-run ]; then dry=yes; else flags+=("$word"); fi
    case $word in --arch | --arch=*) network=() ;; esac # another one has a depth of its own
done
output=$(realpath -m "${OUTPUT_DIR:-runs/imagenet}")
cd "$here"
PYTHON=python3
wanted='torch torchvision scipy tqdm tensorboard sklearn yaml'
if ! python3 -c "import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, '$wanted'.split())))" 2>/dev/null; then
    # shellcheck source=scripts/setup.sh
    source scripts/setup.sh requirements.txt
fi
"$PYTHON" - <<'PYTHON' # settings that would do nothing here
from experiment.grid import refuse_foreign, refuse_misspelt

settings = "EPOCHS SPARSITIES OPTIMIZERS METHOD SEEDS PROCESSES OUTPUT_DIR IMAGES_PER_SECOND".split()
refuse_misspelt(settings, "script")
refuse_foreign(settings, "script")
PYTHON
child='' ended=''
trap 'ended=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' INT TERM HUP
train() { # a signal ends wait, not the training, which has a checkpoint to write
    local code=0
    "$@" &
    child=$!
    [ -z "$ended" ] || kill -TERM "$child" 2>/dev/null || true
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=''
    [ "$code" = 0 ] || [ -n "$ended" ] || exit "$code"
}
processes=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

for seed in ${SEEDS:-0 1 2}; do
    for epochs in ${EPOCHS:-90 150}; do
        for sparsity in ${SPARSITIES:-0.8 0.9}; do
            for optimizer in ${OPTIMIZERS:-sgd samv2}; do
                [ -z "$ended" ] || exit 130
                case $optimizer in
                    sgd) sam=(--optmzr sgd) ;;
                    sam) sam=(--optmzr sgd-sam --sam-rho 0.05) ;;
                    samv2) sam=(--optmzr sgd-sam --sam-v2 --sam-rho 1.0) ;; # rho of Ji et al. 2024 on ImageNet
                    *) echo "error: OPTIMIZERS are sgd, sam and samv2, not '$optimizer'" >&2; exit 2 ;;
                esac
                name=$optimizer-$sparsity
                case ${METHOD:-random} in
                    random) sparse=(--prune-method random --sparsity "$sparsity" --sparsity-distribution erk) ;;
                    none) sparse=(--prune-method none) name=$optimizer-dense ;;
                    *) sparse=(--prune-method "$METHOD" --sparsity "$sparsity") name=$optimizer-$METHOD-$sparsity ;;
                esac
                # The learning rate is 0.1 for 256 images, in proportion to the batch (Goyal et al. 2017).
                run=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" main_prune_train.py
                    --dataset imagefolder --data-dir "$data" ${network[@]+"${network[@]}"}
                    --epochs "$epochs" --batch-size 1024 --lr 0.4 --warmup-epochs 5 --weight-decay 1e-4 --no-norm-decay
                    --smooth-eps 0.1 "${sam[@]}" "${sparse[@]}" --seed "$seed" --resume auto
                    --output-dir "$output/$name-$epochs-$seed" ${flags[@]+"${flags[@]}"})
                if [ -n "$dry" ]; then
                    printf '%q ' "${run[@]}"
                    echo
                    "$PYTHON" -m benchmarks.imagenet "$data" "${IMAGES_PER_SECOND:-0}" "${run[@]:6}"
                else
                    train "${run[@]}"
                fi
            done
        done
    done
done
[ -z "$ended" ] || exit 130
