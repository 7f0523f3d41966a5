#!/usr/bin/env bash
# Adaptive SAM (ASAM), two-step and one-step, over rho, which has to be larger than without --adaptive.

set -euo pipefail
# shellcheck source=scripts/sweep_lib.sh
source "$(dirname "$0")/sweep_lib.sh"
begin_sweep "$@"
read -r -d '' -a rhos <<<"${RHOS:-0.1 0.2 0.5 1 2}" || true
for rho in "${rhos[@]}"; do
    add_arm "asam-rho$rho" --optmzr sgd-sam --adaptive --sam-rho "$rho"
    add_arm "asamv2-rho$rho" --optmzr sgd-sam --sam-v2 --adaptive --sam-rho "$rho"
done
run_sweep
