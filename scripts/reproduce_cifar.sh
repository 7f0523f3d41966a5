#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt requirements-analysis.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# The table of the paper on CIFAR: 2 networks x 2 data sets x 3 sparsities x 8 methods x 3 optimizers x 3 seeds: 864 runs.
# It ends with the table in OUTPUT_DIR/RESULTS.md.

ARCHS      = resnet vgg
OPTIMIZERS = sgd sam samv2
DATASETS   = cifar10 cifar100
METHODS    = snip grasp synflow random set rigl mest lth
SPARSITIES = 0.9 0.95 0.98

{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=sgd}    --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd
{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=sam}    --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd-sam
{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=samv2}  --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd-sam --sam-v2
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=sgd}       --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=sam}       --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd-sam
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=samv2}     --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd-sam --sam-v2

> python -m analysis.summarize {OUTPUT_DIR} --pivot prune_method --output {OUTPUT_DIR}
> cp {OUTPUT_DIR}/pivot.md {OUTPUT_DIR}/RESULTS.md
GRID
