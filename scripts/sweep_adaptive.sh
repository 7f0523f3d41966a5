#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# Adaptive SAM (ASAM), two-step and one-step, over rho, which has to be larger than without --adaptive.

RHOS = 0.1 0.2 0.5 1 2  # radius of the perturbation

asam-rho{RHOS}    --optmzr sgd-sam --adaptive --sam-rho {RHOS}
asamv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --adaptive --sam-rho {RHOS}
GRID
