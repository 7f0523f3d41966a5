#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# SGD, two-step SAM and one-step SAM.

RHOS = 0.05  # radius of the perturbation

sgd              --optmzr sgd
sam-rho{RHOS}    --optmzr sgd-sam --sam-rho {RHOS}
samv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --sam-rho {RHOS}
GRID
