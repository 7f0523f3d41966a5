#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements.txt
exec "$PYTHON" -m experiment.sweep "$0" "$OLDPWD" "$@" <<'GRID'
# One-step SAM over rho.

RHOS = 0.01 0.02 0.05 0.1 0.2  # radius of the perturbation

samv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --sam-rho {RHOS}
GRID
