#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# The full grid: SGD, then SAM over rho, with one step or two, adaptive or not.

RHOS = 0.02 0.05 0.1 0.2 0.5 1  # radius of the perturbation

sgd               --optmzr sgd
sam-rho{RHOS}     --optmzr sgd-sam --sam-rho {RHOS}
samv2-rho{RHOS}   --optmzr sgd-sam --sam-v2 --sam-rho {RHOS}
asam-rho{RHOS}    --optmzr sgd-sam --adaptive --sam-rho {RHOS}
asamv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --adaptive --sam-rho {RHOS}
GRID
