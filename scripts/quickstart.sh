#!/usr/bin/env bash
# Train a 90% sparse ResNet-20 with one-step SAM on real handwritten digits. Further flags go to main_prune_train.py.
# Launched again it goes on where it was interrupted. What it installs first, and from where: scripts/setup.sh.
set -euo pipefail
flags=("$@")
set -- requirements.txt
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh"

echo "Curves: $PYTHON -m tensorboard.main --logdir runs"
exec "$PYTHON" main_prune_train.py --dataset digits --arch resnet --depth 20 --optmzr sgd-sam --sam-v2 \
    --prune-method random --sparsity 0.9 --epochs 30 --resume auto ${flags[@]+"${flags[@]}"}
