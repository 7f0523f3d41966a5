#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt requirements-analysis.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# The table of the paper on CIFAR: 2 networks x 2 data sets x 3 sparsities x 7 methods x 3 optimizers x 3 seeds: 756 runs.
# The other methods are extras: METHODS="random synflow".
# It ends with the table in OUTPUT_DIR/RESULTS.md.

ARCHS      = resnet vgg
OPTIMIZERS = sgd sam samv2
DATASETS   = cifar10 cifar100
METHODS    = lth snip grasp set dsr rigl mest
SPARSITIES = 0.9 0.95 0.98
PROFILE    = default  # official: as the released scripts train, as far as flags can say it (docs/differences.md)

{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=sgd}    --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd
{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=sam}    --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd-sam
{DATASETS}-{ARCHS=resnet}-{OPTIMIZERS=samv2}  --dataset {DATASETS} --arch resnet --depth 32 --width 2 --optmzr sgd-sam --sam-v2
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=sgd}       --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=sam}       --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd-sam
{DATASETS}-{ARCHS=vgg}-{OPTIMIZERS=samv2}     --dataset {DATASETS} --arch vgg --depth 19 --optmzr sgd-sam --sam-v2

# In the official profile 0.9, 0.95 and 0.98 are sparsities of the 3x3 convolutions, not of the whole network.
+ {PROFILE=official} --batch-size 64
+ {PROFILE=official} {OPTIMIZERS=sgd} --weight-decay 1e-4
+ {PROFILE=official} {OPTIMIZERS=samv2} --adaptive --sam-rho 0.05
+ {PROFILE=official} {METHODS=mest} --mest-soft --mest-lambda 0 --stop-update 0.8125
+ {PROFILE=official} {METHODS=random|set|dsr|rigl|mest} --sparsity-distribution uniform
+ {PROFILE=official} {METHODS=!none} {ARCHS=resnet} --dense-layers stem shortcut classifier
+ {PROFILE=official} {METHODS=!none} {ARCHS=vgg} --dense-layers stem classifier
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar10}  {SPARSITIES=0.9}  --sparsity 0.893993
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar10}  {SPARSITIES=0.95} --sparsity 0.943660
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar10}  {SPARSITIES=0.98} --sparsity 0.973460
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar100} {SPARSITIES=0.9}  --sparsity 0.888478
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar100} {SPARSITIES=0.95} --sparsity 0.937837
+ {PROFILE=official} {ARCHS=resnet} {DATASETS=cifar100} {SPARSITIES=0.98} --sparsity 0.967453
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar10}  {SPARSITIES=0.9}  --sparsity 0.899692
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar10}  {SPARSITIES=0.95} --sparsity 0.949675
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar10}  {SPARSITIES=0.98} --sparsity 0.979665
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar100} {SPARSITIES=0.9}  --sparsity 0.897627
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar100} {SPARSITIES=0.95} --sparsity 0.947495
+ {PROFILE=official} {ARCHS=vgg}    {DATASETS=cifar100} {SPARSITIES=0.98} --sparsity 0.977416

> python -m analysis.summarize {OUTPUT_DIR} --pivot prune_method --output {OUTPUT_DIR}
> cp {OUTPUT_DIR}/pivot.md {OUTPUT_DIR}/RESULTS.md
GRID
